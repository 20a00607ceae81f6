"""The config files that a kit makes, before anybody edits them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from fedloom_common.errors import BadSpec

COORDINATOR_YAML = """\
# Config of the coordinator: fedloom coordinator --config coordinator.yaml
# Relative paths start at this file's folder.

listen: 0.0.0.0:{port}
tls:
  ca: ca.crt
  certificate: coordinator.crt
  key: coordinator.key
  # Certificates that no longer count; `fedloom provision revoke` makes a new one to copy here.
  crl: revoked.crl
# Runs, models and updates; needs room for a few models.
state_dir: state
"""

SITE_YAML = """\
# Config of site {name}: fedloom client --config site.yaml
# Relative paths start at this file's folder.

coordinator: "{coordinator}"
tls:
  ca: ca.crt
  certificate: site.crt
  key: site.key
# Models, packed data and updates that wait for delivery.
state_dir: state

# EDIT: this site's data sets, by the names under which run specs ask for them.
# format is text (one document a file), jsonl or parquet (a record a line or row, with the fields that the
# run's task reads, such as text), or dataset (a directory that the datasets library saved).
{data}
# What this site permits, and how it trains; remove the # to change a value.
# labels:
#   ward: icu
# policy:
#   max_model_bytes: 4000000000
#   max_steps_per_round: 1000
# workers:
#   nproc_per_node: 2
"""

OPERATOR_YAML = """\
# Config of {role} {name}: fedloom run list --config operator.yaml
# Relative paths start at this file's folder.

coordinator: "{coordinator}"
tls:
  ca: ca.crt
  certificate: {role}.crt
  key: {role}.key
"""

_SUFFIX_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def data_section(data: Mapping[str, Sequence[str]] | None) -> str:
    """The data sets of a site.yaml: the files of each, or an example to edit.

    Raises:
        BadSpec: the files of a set have several formats.
    """
    sets = {}
    for name, files in (data or {"texts": ["data/*.txt"]}).items():
        formats = {_SUFFIX_FORMATS.get(Path(file).suffix, "text") for file in files}
        if len(formats) != 1:
            raise BadSpec(
                f"the files of data set {name} have several formats ({', '.join(sorted(formats))}); "
                "give each its own name"
            )
        sets[name] = {"format": formats.pop(), "files": list(files)}
    return yaml.safe_dump({"data": sets}, sort_keys=False, default_flow_style=False)
