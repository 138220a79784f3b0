"""``.pt`` files without executing what they hold.

Only ``torch.load(weights_only=True)`` reads them: it builds plain containers and tensors and calls
nothing else but what is on a list. On it are numpy's arrays, and, replaced by :class:`Unread` and
so never built, pictures and the few classes of the trainers that may lie beside the values.
Anything else is refused, by name.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from omni_grpo_core.doctor.dumps.places import Place
from omni_grpo_core.errors import TraceError
from omni_grpo_core.io.bounded import MAX_BYTES, Unreadable, plain_file

_MOST = 16 * MAX_BYTES
_REFUSED = re.compile(r"(?:GLOBAL|class|function) ([\w.]+)")
_ARRAYS = (
    *(np.ndarray, np.dtype, np.zeros(0).__reduce__()[0], np.float32(0).__reduce__()[0]),
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
)


class Unread:
    """In the place of an object that is not read."""

    def __init__(self, *values: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_NOT_READ = (
    "PIL.Image.Image",
    *(f"PIL.{kind}ImagePlugin.{kind}ImageFile" for kind in ("Bmp", "Gif", "Png", "Webp")),
    "PIL.JpegImagePlugin.JpegImageFile",
    "PIL.WebPImagePlugin.WebPImageFile",
    "miles.utils.types.AdapterRef",
    "miles.utils.types.RewardSpec",
)


def load_plain(path: Path, place: Place) -> Any:
    """What a ``.pt`` file holds, on the CPU.

    Raises:
        TraceError: it is no such file, or names anything that would have to be executed.
    """
    try:
        with plain_file(path) as (file, size):
            if size > _MOST:
                raise place.error(f"{size} bytes", f"at most {_MOST}")
            listed: list[Any] = [*_ARRAYS, *((Unread, name) for name in _NOT_READ)]
            with torch.serialization.safe_globals(listed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other pickle protocols
                return torch.load(file, map_location="cpu", weights_only=True)
    except Unreadable as error:
        raise place.error(error.got) from None
    except UnpicklingError as error:
        named = _REFUSED.search(str(error))
        raise place.error(
            f"{named[1]}, which is not data and was not executed" if named else "a foreign pickle",
            "tensors, arrays and plain values",
        ) from None
    except TraceError:
        raise
    except Exception as error:  # a foreign file may raise anything
        said = (str(error).splitlines() or [""])[0]
        raise place.error(f"no file of torch.save ({said[:160]})") from None
