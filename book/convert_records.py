"""Rewrite the committed records once: `matched` for what was matched, `gradient_similarity` for `geometry`.

python book/convert_records.py book/results/*.json
"""

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {"geometry": "gradient_similarity", "geometry_every": "similarity_every"}


def converted(value: Any) -> Any:
    """The value, with every line and every table of columns in the new form."""
    if isinstance(value, list):
        return [converted(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    value = {NAMES.get(key, key): converted(entry) for key, entry in value.items()}
    if {"starts", "expert", "loss"} <= value.keys():
        several = isinstance(value["expert"], list)
        starts, experts, replayed, others = (
            value.pop(name, None) for name in ("starts", "expert", "replayed", "others")
        )
        if several:
            rows = zip(starts, experts, replayed or [[]] * len(starts), others or [[]] * len(starts), strict=True)
            matched: Any = [[[e, s] for s in row] + o + r for row, e, r, o in rows]
        else:
            matched = [[experts, s] for s in starts] + (others or []) + (replayed or [])
        keys = list(value)
        at = keys.index("loss") + 1
        value = {**{k: value[k] for k in keys[:at]}, "matched": matched, **{k: value[k] for k in keys[at:]}}
    return value


for name in sys.argv[1:]:
    path = Path(name)
    text = path.read_text()
    record = json.loads(text)
    new = converted(record)
    if new != record:
        indent = 1 if text.startswith("{\n") else None
        path.write_text(json.dumps(new, indent=indent, ensure_ascii="\\u" in text) + "\n")
        print(path)
