"""A loaded checkpoint: with the codec of one embodiment, or with those of all."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from vlafit.agreement import Agreement
from vlafit.checkpoints.load_report import LoadReport
from vlafit.codec import Codec, CodecSet
from vlafit.errors import ConfigError
from vlafit.nn.policy import Policy
from vlafit.tuning import Plan


class Loaded(NamedTuple):
    """A policy and what belongs to it, None where there is none; the report says why there is no codec."""

    policy: Policy
    codec: Codec | None
    plan: Plan | None
    report: LoadReport


@dataclass(frozen=True)
class LoadedSet:
    """A policy with the codecs of all its embodiments, and what else belongs to it."""

    policy: Policy
    codecs: CodecSet | None
    plan: Plan | None
    report: LoadReport
    agreement: Agreement | None = None
    """What it agreed on with the data that it learned from; None where it does not say."""

    def of(self, embodiment: str = "") -> Loaded:
        """Return it with the codec of one embodiment; the only one without a name.

        Without a name there is no codec where there are several embodiments, and the report says so. Raises
        ConfigError for an embodiment that the checkpoint does not have.
        """
        codecs, report = self.codecs, self.report
        if codecs is None and embodiment:
            raise ConfigError(
                f"{report.path}: has no embodiment {embodiment!r}: there is no codec ({report.codec})"
            )
        if codecs is not None and len(codecs) > 1 and not embodiment:
            names = ", ".join(codecs.names)
            reason = f"there are {len(codecs)} embodiments ({names}), of which none was named"
            return Loaded(self.policy, None, self.plan, replace(report, codec=reason))
        codec = None if codecs is None else codecs.choose(embodiment, where=report.path)
        return Loaded(self.policy, codec, self.plan, report)
