"""What a run asks of a site before it may take part, and the labels by which sites are told apart."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from fedloom_common.strict import Pattern, Strict

LABEL = "up to 63 letters, digits, dots, dashes, slashes and underscores, with a letter or digit at both ends"
"""What a label's name or value looks like, for error messages."""
Label = Annotated[str, Pattern(r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$", f"{LABEL}, such as icu")]
MOST_LABELS = 64

GB = 1e9  # decimal, as vendors of devices count: an "80 GB" device reports at least 8e10 bytes


class Require(Strict):
    """What a site must have, all of it; its config or the operator gives it labels."""

    gpus: int | None = Field(default=None, ge=1)
    """GPUs at least; with ``gpu_memory_gb``, GPUs of that size."""
    gpu_memory_gb: float | None = Field(default=None, gt=0)
    """Memory of a GPU at least, in 10⁹ bytes; one such GPU is enough unless ``gpus`` asks for more."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Main memory at least, in 10⁹ bytes."""
    data_bytes: int | None = Field(default=None, ge=1)
    """Size of the run's data set at least, in bytes."""
    label: Label | tuple[Label, ...] = ()
    """A label's name or value that the site has, or a list of them, of which it has every one."""
    labels: dict[Label, Label | tuple[Label, ...]] = Field(default={})
    """Labels by name with the value that the site gives it, or a list of values of which it gives one."""

    @property
    def wanted_labels(self) -> tuple[str, ...]:
        """What ``label`` asks for, as a list."""
        return (self.label,) if isinstance(self.label, str) else self.label

    def values_of(self, name: str) -> tuple[str, ...]:
        """The values that ``labels`` accepts under a name."""
        wanted = self.labels[name]
        return (wanted,) if isinstance(wanted, str) else wanted

    @model_validator(mode="after")
    def _every_label_has_a_value(self) -> Self:
        empty = [name for name, wanted in self.labels.items() if not wanted]
        if empty:
            raise ValueError(f"labels.{empty[0]} is an empty list, which no site can meet; name its values")
        return self
