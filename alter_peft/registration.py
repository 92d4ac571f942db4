# SPDX-License-Identifier: Apache-2.0
"""The only contact with PEFT's internals: makes `PeftType.ALTER` a member like any other.

PEFT has no plug-in mechanism: `PeftType` is a closed enum, and a bare string breaks wherever PEFT or transformers asks
for `.value`. So the enum itself is extended, once, before the config class is defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel, mapping
from peft.utils import PeftType, register_peft_method


NAME = "ALTER"
# transformers hard-codes `peft_type.lower() + "_"` in `load_adapter`, so the prefix is no free choice
PREFIX = "alter_"
_WRAPPED = "_alter_wrapped"  # an attribute of our `save_pretrained`: itself, and the one that it goes around


def extend_peft_type() -> PeftType:
    """Add `ALTER` to `peft.PeftType` and return the member; does nothing but return it the second time."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member: Any = str.__new__(PeftType, NAME)
    member._name_, member._value_, member.__objclass__ = NAME, NAME, PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    if PeftType(NAME) is not member or PeftType[NAME] is not member or member not in list(PeftType):
        raise ImportError(
            f"alter-peft could not extend peft.PeftType on this Python ({PeftType!r} does not list {NAME}). "
            "Please report this with your Python and PEFT versions."
        )
    return PeftType[NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Enter the config and tuner classes in PEFT's mappings; importing the package again replaces its own entry."""
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(ALTER)
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
        return
    if known.__module__ != config_cls.__module__:
        raise ImportError(
            f"PEFT method {NAME} is already registered by {known.__module__}; alter-peft cannot be imported beside it."
        )
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[ALTER] = config_cls
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[ALTER] = model_cls


def save_by(through: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """
    Have `PeftModel.save_pretrained` go through `through`, once: PEFT asks no tuner before it writes. What other
    libraries have put around it stays.
    """
    model: Any = PeftModel
    inner: Any = model.save_pretrained
    ours, before = vars(inner).get(_WRAPPED, (None, None))
    if ours is inner:  # the package is imported again
        inner = before
    elif ours is not None:  # `functools.wraps` copies attributes: another's is around ours
        return
    model.save_pretrained = through(inner)
    vars(model.save_pretrained)[_WRAPPED] = (model.save_pretrained, inner)


ALTER: PeftType = extend_peft_type()
