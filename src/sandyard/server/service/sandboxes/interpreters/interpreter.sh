# Runs pieces of shell code one after another in one bash. Each line of its input is the mark, the
# code and its input, the last two in base64; see interpreter.py for the reports.
exec {__sandyard_asked}<&0 0</dev/null
trap : INT
__sandyard_base64=$(type -P base64)
while read -r __sandyard_mark __sandyard_code __sandyard_stdin <&"$__sandyard_asked"; do
    [[ $__sandyard_mark =~ ^[0-9a-f]{32}$ ]] || continue # the rest of a request that was broken off
    printf '\0%sB{}\0' "$__sandyard_mark" >&2
    printf '\0%sB{}\0' "$__sandyard_mark"
    __sandyard_code=$("$__sandyard_base64" -d <<<"$__sandyard_code" && printf .) && __sandyard_code=${__sandyard_code%.}
    eval "$__sandyard_code" {__sandyard_asked}<&- < <("$__sandyard_base64" -d <<<"${__sandyard_stdin:-}")
    __sandyard_status=$?
    printf '\0%sE{}\0' "$__sandyard_mark" >&2
    if [ "$__sandyard_status" = 0 ]; then
        printf '\0%sE{"error":null}\0' "$__sandyard_mark"
    else
        printf '\0%sE{"error":{"name":"CommandFailed","value":"exit code %d","traceback":""}}\0' \
            "$__sandyard_mark" "$__sandyard_status"
    fi
done
