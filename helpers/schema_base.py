"""What the models of result files (`schema`) are made of."""

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator


class Data(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Exact(Data):
    """Written with exactly these keys (`context="writing"`). Read, keys that schema 1 did not have are None."""

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo):
        if info.context == "writing":
            unknown, left_out = set(self.model_extra or {}), set(type(self).model_fields) - self.model_fields_set
            if unknown or left_out:
                raise ValueError(f"unknown keys {sorted(unknown)}, missing keys {sorted(left_out)}")
        return self


class NotDone(Exact):
    """In place of an optional part."""

    reason: str  # why it was not done, one sentence


class Interval(Exact):
    """Of `statistics.confidence`; None with a reason."""

    ci_low: float | None
    ci_high: float | None
    reason: str | None
