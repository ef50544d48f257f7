"""The ways into machines that are not the API: SSH, previews."""
