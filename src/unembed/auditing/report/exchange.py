"""The report for other tools: SARIF for code scanning, JSON lines in the manner of garak."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import quote

from unembed.auditing.findings import SEVERITIES
from unembed.auditing.result import AuditReport
from unembed.auditing.scoring import ANY, EXACT, Figures
from unembed.auditing.sensitive import KINDS

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {"critical": "error", "high": "error", "medium": "warning", "low": "note", "none": "none"}
_SCORES = {"critical": "9.5", "high": "8.0", "medium": "5.5", "low": "3.0", "none": "0.0"}
_PROBE = "unembed.EmbeddingInversion"


def to_sarif(report: AuditReport) -> dict[str, Any]:
    """SARIF 2.1.0: a rule and a result a finding; the place is the collection."""
    place = f"vector-store/{quote(report.store.kind)}/{quote(report.store.collection)}"
    rules, results = [], []
    for finding in report.findings:
        tags = ["security", *(i for ids in finding.references.values() for i in ids)]
        rules.append(
            {
                "id": finding.id,
                "shortDescription": {"text": finding.title},
                "help": {"text": finding.remedy},
                "properties": {"tags": tags, "security-severity": _SCORES[finding.severity]},
            }
        )
        results.append(
            {
                "ruleId": finding.id,
                "level": _LEVELS[finding.severity],
                "message": {"text": f"{finding.title}. {finding.evidence}"},
                "locations": [
                    {
                        "physicalLocation": {
                            "artifactLocation": {"uri": place},
                            "region": {"startLine": 1},
                        },
                        "logicalLocations": [{"name": report.store.collection, "kind": "resource"}],
                    }
                ],
                "partialFingerprints": {"finding/v1": f"{place}#{finding.id}"},
                "properties": {"severity": finding.severity, "reproduce": finding.reproduce},
            }
        )
    driver = {"name": "unembed", "version": _version(), "rules": rules}
    run = {"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints"}
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def to_garak_lines(report: AuditReport) -> Iterator[dict[str, Any]]:
    """Lines as garak's reports have them, so that results can be joined; not garak's own.

    A run's head, an attempt for each record shown, and an evaluation for each attack and kind of
    what hurts, where ``passed`` counts what did *not* come back.
    """
    run = str(uuid.uuid5(uuid.NAMESPACE_URL, repr(sorted(report.settings.items()))))
    yield {
        "entry_type": "start_run setup",
        "run": run,
        "generator": f"unembed {_version()}",
        "settings": report.settings,
        "store": report.store.to_dict(),
    }
    for place, record in enumerate(report.records):
        yield {
            "entry_type": "attempt",
            "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{run}#{place}")),
            "seq": place,
            "status": 2,
            "probe_classname": _PROBE,
            "goal": "recover the text of a stored vector",
            "prompt": f"vector {record.id}",
            "outputs": [" ".join(word for word, _ in record.words)],
            "detector_results": {"token_f1": [record.f1]},
            "notes": {"hurt": record.hurt, "group": record.group, "attack": record.attack},
        }
    for name, attack in report.attacks.items():
        yield from _evaluations(run, name, attack["figures"] or {})
    yield {
        "entry_type": "completion",
        "run": run,
        "severity": report.severity,
        "severities": list(SEVERITIES),
        "leak": report.leak,
    }


def _evaluations(run: str, attack: str, figures: Figures) -> Iterator[dict[str, Any]]:
    for kind in (EXACT, *KINDS, ANY):
        figure = figures.get(kind)
        if figure is not None:
            back = round(figure.mean * figure.n)
            yield {
                "entry_type": "eval",
                "run": run,
                "probe": f"{_PROBE}.{attack}",
                "detector": f"unembed.recall.{kind}",
                "passed": figure.n - back,
                "total": figure.n,
            }


def _version() -> str:
    try:
        return version("unembed")
    except PackageNotFoundError:
        return "unknown"
