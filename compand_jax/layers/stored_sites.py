"""Sites as JSON, and back, every field checked."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from compand_jax.layers.sites import Site, check_signs, checked_fields, require_sites

_OF_GROUPS = {"group_size": None, "group_axis": None, "scale_dtype": "float32"}
"""Fields that are left out where they are these."""


def sites_to_json(sites: Mapping[str, Site]) -> str:
    """Returns a calibrated model's `sites` as JSON, to be stored with a checkpoint.

    A checkpoint of `variables` holds every mu and scale. The signs that calibration found are in
    the sites; without them the model takes every activation to be signed.

    Args:
      sites: `Site` objects by name, such as `qmodel.sites`.

    Returns:
      The text of a JSON object.

    Raises:
      TypeError: these are not sites by name.

    >>> sites = {"conv": Site(4, 8, scale_axes=(-1,)), "head": Site(8, None)}
    >>> sites_from_json(sites_to_json(sites)) == sites
    True
    """
    require_sites(sites)
    fields = {name: _fields(site) for name, site in sites.items()}
    return json.dumps(fields, default=int)  # bits may be NumPy's integers


def sites_from_json(text: str | bytes) -> dict[str, Site]:
    """Returns the sites that `sites_to_json` wrote, for `quantize_model(..., sites=...)`.

    Args:
      text: Of a JSON object, by name. It is not trusted: every field is checked.

    Returns:
      `Site` objects by name.

    Raises:
      ValueError: the text is no JSON, or a site has another field than a `Site`, lacks one, or
        has one that is out of its range.
    """
    try:
        found = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`text` must be JSON that sites_to_json wrote: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"`text` must be a JSON object of sites, got one of type {type(found).__name__}: give "
            "the text that sites_to_json wrote"
        )
    sites = {name: _site_from_fields(name, fields) for name, fields in found.items()}
    check_signs(sites)
    return sites


def _fields(site: Site) -> dict[str, Any]:
    fields = dataclasses.asdict(site)
    return {k: x for k, x in fields.items() if k not in _OF_GROUPS or x != _OF_GROUPS[k]}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name comes twice among {', '.join(name for name, _ in pairs)}")
    return found


def _site_from_fields(name: str, fields: Any) -> Site:
    names = [field.name for field in dataclasses.fields(Site)]
    # What was stored before there was standardization has no such field.
    whole = _OF_GROUPS | {"weight_standardization": False}
    whole = whole | fields if isinstance(fields, dict) else {}
    if set(whole) != set(names):
        expected = [name for name in names if name not in _OF_GROUPS]
        got = ", ".join(fields) if isinstance(fields, dict) else repr(fields)
        raise ValueError(
            f"site {name!r} must have the fields {', '.join(expected)}, got {got}: give the text "
            "that sites_to_json wrote"
        )
    try:
        return Site(**checked_fields(whole))
    except ValueError as error:
        raise ValueError(f"site {name!r}: {error}") from None
