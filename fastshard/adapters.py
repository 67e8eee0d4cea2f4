# SPDX-License-Identifier: Apache-2.0
"""What runs in place of a replaced function; ``patching.TABLE`` says which one.

Each is called as ``implementation(original, *args, **kwargs)``. A door that stands for its namesake takes what that
takes and no more, so that nobody comes to depend on arguments of ours through somebody else's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from . import archive, hub, saving, staged


def _namesake(door: Callable[..., Any]) -> Callable[..., Any]:
    """The door for callers of the original: without the parameters that only fastshard has."""
    signature = inspect.signature(door)
    theirs = [p for p in signature.parameters.values() if p.name not in saving.How._fields]
    original = inspect.Parameter("original", inspect.Parameter.POSITIONAL_ONLY)

    def implementation(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return door(*args, **kwargs)

    implementation.__signature__ = signature.replace(parameters=[original, *theirs])  # type: ignore[attr-defined]
    return implementation


save_file = _namesake(staged.save_file)
save = _namesake(saving.save)
save_model = _namesake(saving.save_model)
save_torch_state_dict = _namesake(hub.save_torch_state_dict)
save_torch_model = _namesake(hub.save_torch_model)
torch_save = archive.in_the_place_of_torch
