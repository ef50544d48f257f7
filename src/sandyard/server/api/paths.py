"""Paths within addresses."""

from starlette.convertors import Convertor, register_url_convertor
from typing_extensions import override

WHOLE = "whole"


class _Whole(Convertor[str]):
    """All that is left of an address, line ends included: files may have such names."""

    regex = r"(?s:.*)"

    @override
    def convert(self, value: str) -> str:
        """Return it as it is."""
        return value

    @override
    def to_string(self, value: str) -> str:
        """Return it as it is."""
        return value


register_url_convertor(WHOLE, _Whole())
