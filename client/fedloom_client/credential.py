"""This site's certificate while the daemon runs: read again when it changes, warned of before it ends."""

import asyncio
import logging
from collections.abc import Callable
from typing import NoReturn

from fedloom_common.errors import BadSpec
from fedloom_common.rotation import ExpiryWarnings, LiveCredential

LOOK_S = 2.0  # a file that has changed is used after two looks
ADVICE = "ask who runs the federation for a new one (fedloom provision renew site), and copy it over this one"

logger = logging.getLogger(__name__)


async def keep_credential(credential: LiveCredential, on_new: Callable[[], object]) -> NoReturn:
    """Look after the files, until cancelled; ``on_new`` is called when another certificate is in use."""
    warnings = ExpiryWarnings()
    while True:
        warnings.look("this site", credential.expires, ADVICE)
        await asyncio.sleep(LOOK_S)
        try:
            if credential.look():
                ends = f"{credential.expires:%Y-%m-%d %H:%M} UTC"
                logger.info("a new certificate is in use", extra={"ends": ends})
                on_new()
        except BadSpec as error:
            logger.error("a changed tls file is wrong; what was in use stays", extra={"reason": str(error)})
