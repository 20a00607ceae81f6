"""What operators decide about sites: who gets work, who may attach, who is remembered, with which labels."""

import logging
from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError

from fedloom_common.errors import BadSpec, NotFound, WrongState
from fedloom_common.requirements import LABEL, MOST_LABELS, Label
from fedloom_common.strict import NAME, Name
from fedloom_server.assignments import Assignments
from fedloom_server.federationrecords import SiteState
from fedloom_server.roster import Roster, Site
from fedloom_server.sites import Sites

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_LABEL: TypeAdapter[str] = TypeAdapter(Label)

logger = logging.getLogger(__name__)


class Admission:
    """Every decision is durable before it is answered, and survives a restart of the coordinator."""

    def __init__(self, roster: Roster, sites: Sites, assignments: Assignments) -> None:
        self._roster = roster
        self._sites = sites
        self._assignments = assignments

    def site(self, name: str) -> Site:
        """A known site.

        Raises:
            NotFound: there is none of that name.
        """
        site = self._roster.get(name)
        if site is None:
            raise NotFound(f"there is no site {name[:200]!r}; `fedloom sites list` names them")
        return site

    def drain(self, name: str, reason: str) -> Site:
        """Give a site nothing new; it finishes what it has.

        Raises:
            NotFound, WrongState: it is not known, or blocked.
        """
        site = self.site(name)
        if site.record.state is SiteState.BLOCKED:
            raise WrongState(f"site {name} is blocked already, and gets no work: {site.record.reason}")
        return self._decide(site, SiteState.DRAINING, reason or "drained by an operator")

    def undrain(self, name: str) -> Site:
        """Give a draining site work again.

        Raises:
            NotFound, WrongState: it is not known, or not draining.
        """
        return self._release(name, SiteState.DRAINING)

    def block(self, name: str, reason: str) -> Site:
        """End a site's session and its assignments, and refuse its calls; also one that never came.

        Raises:
            BadSpec: no site can have that name.
        """
        try:
            _NAME.validate_python(name)
        except ValidationError:
            raise BadSpec(f"no site can be named {name[:200]!r}: wanted are {NAME}") from None
        site = self._decide(self._roster.add(name), SiteState.BLOCKED, reason or "blocked by an operator")
        refusal = self._sites.refusal(name)
        assert refusal is not None, "it has just been blocked"
        self._assignments.withdraw(name, refusal)
        link, site.link = site.link, None
        if link is not None:
            link.refuse(refusal)
        return site

    def unblock(self, name: str) -> Site:
        """Let a blocked site attach again.

        Raises:
            NotFound, WrongState: it is not known, or not blocked.
        """
        return self._release(name, SiteState.BLOCKED)

    def forget(self, name: str) -> None:
        """Remove what is known of a site; what it did stays with its runs.

        Raises:
            NotFound, WrongState: it is not known, is connected, or blocked.
        """
        site = self.site(name)
        if site.link is not None:
            raise WrongState(f"site {name} is connected and would come back: stop its client first")
        if site.record.state is SiteState.BLOCKED:
            raise WrongState(
                f"site {name} is blocked, and could attach if it were forgotten: unblock it first"
            )
        self._roster.remove(site)
        logger.info("site forgotten", extra={"site": name})

    def label(self, name: str, labels: Mapping[str, str], drop: frozenset[str]) -> Site:
        """Set labels over the site's own, an empty value takes one away; ``drop`` leaves some to the site.

        Raises:
            NotFound, BadSpec: it is not known, or a label is not well formed.
        """
        site = self.site(name)
        merged = {key: value for key, value in site.record.operator_labels.items() if key not in drop}
        merged |= labels
        wrong = [text for pair in labels.items() for text in pair if text and not is_label(text)]
        if wrong or "" in labels:
            came = wrong[0] if wrong else ""
            raise BadSpec(f"{came[:200]!r} is no label's name or value; wanted {LABEL}")
        if len(merged) > MOST_LABELS:
            raise BadSpec(
                f"site {name} would have {len(merged)} labels from operators, at most {MOST_LABELS}"
            )
        site.record.operator_labels = merged
        self._roster.save(site)
        self._sites.changed()
        logger.info("site labelled", extra={"site": name, "labels": merged})
        return site

    def _release(self, name: str, state: SiteState) -> Site:
        site = self.site(name)
        if site.record.state is not state:
            raise WrongState(f"site {name} is {site.record.state}, not {state}")
        return self._decide(site, SiteState.ACTIVE, "")

    def _decide(self, site: Site, state: SiteState, reason: str) -> Site:
        before = site.record.state, site.record.reason
        site.record.state, site.record.reason = state, reason
        try:
            self._roster.save(site)
        except Exception:
            site.record.state, site.record.reason = before
            raise
        self._sites.changed()
        logger.info("site admission changed", extra={"site": site.name, "state": state, "reason": reason})
        return site


def is_label(text: str) -> bool:
    """Whether a text can be a label's name or value."""
    try:
        _LABEL.validate_python(text)
    except ValidationError:
        return False
    return True
