"""An extension of IPython: what the code interpreter shows of values, as E2B's SDKs expect it."""

import dataclasses
import enum
import json
import sys
import uuid
from collections.abc import Callable
from typing import Any

from IPython.core.formatters import BaseFormatter, JSONFormatter
from traitlets import ObjectName, Unicode


class DataFormatter(BaseFormatter):
    """Shows a pandas DataFrame as its columns."""

    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict

    def __call__(self, shown: Any) -> Any:
        """Return the form of a value, None if it has none."""
        # A value of a library exists only if that was imported.
        pandas = sys.modules.get("pandas")
        if pandas is None or not isinstance(shown, pandas.DataFrame):
            return super().__call__(shown)
        return _as_json({str(name): one for name, one in shown.to_dict(orient="list").items()})


class ChartFormatter(BaseFormatter):
    """Shows a figure of matplotlib as its data."""

    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict

    def __call__(self, shown: Any) -> Any:
        """Return the form of a value, None if it has none."""
        figures = sys.modules.get("matplotlib.figure")
        if figures is None or not isinstance(shown, figures.Figure):
            return super().__call__(shown)
        try:
            from e2b_charts import chart_figure_to_dict

            return _as_json(chart_figure_to_dict(shown))
        except Exception:  # noqa: BLE001 - a figure that it cannot read is still an image
            return None


class PlainFormatter(JSONFormatter):
    """Shows lists and objects as JSON, if JSON has a form of all that is in them."""

    def __call__(self, shown: Any) -> Any:
        """Return the form of a value, None if it has none."""
        if not isinstance(shown, list | dict):
            return super().__call__(shown)
        found = _as_json(shown, _exactly)
        return super().__call__(shown) if found is None else found


def _as_json(value: Any, convert: Callable[[Any], Any] | None = None) -> Any:
    """Return a value as one that JSON has a form of; None if it has none. `convert` is for what is
    in it and has no form."""
    try:
        # Python writes NaN and infinity in ways that JSON does not have.
        text = json.dumps(value, default=convert or _plain)
        return json.loads(text, parse_constant=lambda _: None)
    except (TypeError, ValueError, RecursionError):
        return None


def _exactly(value: Any) -> Any:
    """Return what JSON has no form of as what it has, without loss.

    Raises:
        TypeError: nothing in JSON stands for it.
    """
    if type(value).__module__ == "numpy":
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, uuid.UUID):
        return str(value)
    raise TypeError(f"JSON has no form of {type(value)}")


def _plain(value: Any) -> Any:
    """Return what JSON has no form of as what it has, if need be as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    try:
        return _exactly(value)
    except TypeError:
        return str(value)


def show_images() -> None:
    """Show images of Pillow where they are shown or saved."""
    from IPython.display import display
    from PIL import Image

    saved = Image.Image.save

    def save(image: Any, fp: Any, format: str | None = None, **options: Any) -> None:  # noqa: A002
        if isinstance(fp, str):
            display(image)
        saved(image, fp, format, **options)

    Image.Image.save = save
    Image.Image.show = lambda image, title=None: display(image)


def load_ipython_extension(shell: Any) -> None:
    """Install what shows values."""
    formatters = shell.display_formatter.formatters
    for kind, formatter in (
        ("e2b/data", DataFormatter), ("e2b/chart", ChartFormatter),
        ("application/json", PlainFormatter),
    ):  # fmt: skip
        formatters[kind] = formatter(parent=shell.display_formatter)
    show_images()
