"""The text at the end: a verdict, what is wrong, and the table of times, within 10,000 characters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .document import BAD

__all__ = ["LENGTH", "verdict"]

LENGTH = 10_000
_BAD_LINES, _LINE = 40, 160

Item = dict[str, Any]


def verdict(data: dict[str, Any]) -> str:
    """The whole text; it begins with OK only if every stage is finished and nothing is wrong."""
    items: list[Item] = data["items"]
    bad = [item for item in items if item.get("status") in BAD]
    slow = [item for item in items if item.get("status") == "unfinished"]
    unfinished = [name for name, about in data["stages"].items() if about.get("status") != "ok"]
    word = "NOT OK" if bad else "NOT FINISHED" if unfinished else "OK"
    what = "rehearsal without a GPU; no time is given" if data["rehearsal"] else _device(items)
    parts = [
        f"{word}: first contact, {what}\n{len(items)} results, {len(bad)} wrong or failed; "
        f"stages not ok: {', '.join(unfinished) or 'none'}",
        _stages(data["stages"], items),
        _shares(items),
        "\n".join(_times(items)) if not data["rehearsal"] else "",
        _listed([*bad, *slow]),
    ]
    text = "\n\n".join(part for part in parts if part)
    note = "\n... cut; the rest is in first_contact.json\n"
    return text + "\n" if len(text) < LENGTH else text[: LENGTH - len(note)] + note


def _device(items: Iterable[Item]) -> str:
    about: Item = next((item for item in items if item.get("name") == "device"), {})
    return f"{about.get('device', 'device unknown')}, sm_{str(about.get('capability', '?')).replace('.', '')}"


def _stages(stages: dict[str, Any], items: list[Item]) -> str:
    lines = ["stage             status        seconds  units  items  bad"]
    for name, about in stages.items():
        own = [item for item in items if item["stage"] == name]
        bad = sum(item.get("status") in BAD for item in own)
        units = f"{about.get('units', 0) - about.get('units_left', 0)}/{about.get('units', 0)}"
        line = (
            f"{name:<17} {about.get('status', '?'):<13} {about.get('seconds', 0):>7} {units:>6} {len(own):>6} {bad:>4}"
        )
        lines.append(f"{line}  {about.get('reason', '')}"[:_LINE].rstrip())
    return "\n".join(lines)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _shares(items: list[Item]) -> str:
    """The largest error of each stage and mode, as a share of its budget."""
    worst: dict[str, tuple[float, str]] = {}
    for item in items:
        if "share" in item:
            share = _number(item["share"])
            share = math.inf if math.isnan(share) else share
            group = f"{item['stage']} {item.get('kind', '')} {item.get('mode', '')}".replace("  ", " ").strip()
            if share > worst.get(group, (-1.0, ""))[0]:
                worst[group] = share, item["name"]
    if not worst:
        return ""
    lines = [f"{group:<34} {share:8.3f}  {name}"[:_LINE] for group, (share, name) in worst.items()]
    return "\n".join(["largest error as a share of its budget (above 1: wrong)", *lines])


def _listed(items: list[Item]) -> str:
    """One line per item, with its reason."""
    if not items:
        return ""
    lines = []
    for item in items:
        share = f" share {item['share']}" if "share" in item else ""
        name = item.get("name") or item.get("unit", "")
        text = f"{item['stage']} | {name} | {item['status']}{share} {item.get('reason', '')}"
        lines.append(" ".join(text.split())[:_LINE])
    more = [f"... and {len(lines) - _BAD_LINES} more"] if len(lines) > _BAD_LINES else []
    return "\n".join(["wrong, failed or unfinished", *lines[:_BAD_LINES], *more])


def _us(value: Any) -> str:
    number = _number(value)
    return "-" if math.isnan(number) else f"{number:,.1f}" if number < 1000 else f"{number:,.0f}"


def _times(items: list[Item]) -> list[str]:
    """Microseconds of a step by mode and batch, each contender in a column; then the other times."""
    steps = [item for item in items if item.get("table") == "step" and item.get("us") is not None]
    columns = list(dict.fromkeys(item["who"] for item in steps))
    rows = list(dict.fromkeys((item["mode"], item["batch"]) for item in steps))
    lines = []
    if steps:
        whose = next((item["estimate_of"] for item in steps if "estimate_of" in item), "none for this device")
        whose = whose.partition(", batch")[0]
        lines.append(
            f"microseconds per step, chains of steps; estimates are of the latency model (never measured): {whose}"
        )
        header = "".join(f"{_short(name):>11}" for name in columns)
        lines.append(f"{'mode':<9}{'batch':>6}{header}{'est. fm':>11}{'est. eager':>11}{'fm / est.':>10}")
    for mode, batch in rows:
        own = [item for item in steps if (item["mode"], item["batch"]) == (mode, batch)]
        found = {item["who"]: item["us"] for item in own}
        cells = "".join(f"{_us(found.get(name)):>11}" for name in columns)
        estimates: Item = next((item for item in own if "estimate_us" in item), {})
        theirs = "".join(f"{_us(estimates.get(key)):>11}" for key in ("estimate_us", "estimate_eager_us"))
        ratio = _ratio(found.get("fastmlp"), estimates.get("estimate_us"))
        lines.append(f"{mode:<9}{batch:>6}{cells}{theirs}{ratio:>10}")
    lines += _kernels(items)
    for table, title in (("alternatives", "alternatives: microseconds"), ("facts", "other times and rates")):
        own = [item for item in items if item.get("table") == table]
        if own:
            lines += ["", title]
        lines += [f"{item['name']}: {item.get('text') or _us(item.get('us'))}"[:_LINE] for item in own]
    return lines


def _ratio(measured: Any, estimated: Any) -> str:
    ratio = _number(measured) / _number(estimated) if _number(estimated) else math.nan
    return "-" if math.isnan(ratio) else f"{ratio:.2f}"


def _kernels(items: list[Item]) -> list[str]:
    """A line per mode and batch: measured / estimated microseconds of each kernel."""
    own = [item for item in items if item.get("table") == "kernels" and item.get("us") is not None]
    lines = ["", "kernels among others of their kind in a graph: measured / estimated microseconds"] if own else []
    for mode, batch in dict.fromkeys((item["mode"], item["batch"]) for item in own):
        cells = [
            f"{item['name'].removesuffix(mode).strip()} {_us(item['us'])}/{_us(item.get('estimate_us'))}"
            for item in own
            if (item["mode"], item["batch"]) == (mode, batch)
        ]
        lines.append(f"{mode} {batch}: {'; '.join(cells)}"[: 2 * _LINE])
    return lines


def _short(name: str) -> str:
    return name.replace("compile_", "c_").replace("fastmlp", "fm").replace("reduce_overhead", "r_o")[:10]
