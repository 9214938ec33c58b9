"""What the user sets by environment variables, read once."""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Each field is the variable ``XDIT_`` and its name in capitals."""

    idle_minutes: float = 30.0
    """A group that had nothing to do for so long frees its weights; 0 keeps them."""
    keep_seconds: float = 1.0
    """How often a caller gets the state of its sampling job, to go on from when the group is lost."""
    silent_seconds: float = 10.0
    """A host that says nothing for so long is gone."""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Config":
        """Reads the variables. One with a value that makes no sense is named in the log, and its default is used."""
        found = {}
        for field in fields(cls):
            variable = f"XDIT_{field.name.upper()}"
            text = environment.get(variable)
            if not text:
                continue
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if (0 < value < math.inf) or (value == 0 and field.name == "idle_minutes"):
                found[field.name] = value
            else:
                logger.warning("%s is '%s'; give a number such as %g, which is used now", variable, text, field.default)
        return cls(**found)


CONFIG = Config.read(os.environ)
