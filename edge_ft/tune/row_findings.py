"""What the audit finds in the files of a training: collected, reported, and refused where nothing could be learned."""

from dataclasses import replace
from typing import Any

from edge_ft.data import (
    Columns,
    Example,
    Record,
    Rendering,
    TextTokenizer,
    audit,
    find_unused,
    template_marks,
    untrained_references,
)
from edge_ft.errors import AuditRefused
from edge_ft.progress import Progress
from edge_ft.tune.splits import SPLITS, FileFindings, GivenRows

__all__ = ["audit_files", "drop_untrainable", "report_and_refuse", "unread_fields"]


def unread_fields(given: GivenRows, columns: Columns, examples: dict[str, list[Example]]) -> FileFindings:
    """Return, by file, what its rows say and nothing reads."""
    findings: FileFindings = []
    for file in dict.fromkeys(given.files.values()):
        rows = [row for name, rows in given.rows.items() if given.files[name] == file for row in rows]
        together = [example for name in SPLITS if given.files[name] == file for example in examples[name]]
        unread = {example.row: example.unread for example in together}
        findings += [(file, finding) for finding in find_unused(rows, columns, unread)]
    return findings


def audit_files(
    files: dict[str, str],
    records: dict[str, list[Record]],
    examples: dict[str, list[Example]],
    rendering: Rendering,
    tokenizer: TextTokenizer,
) -> FileFindings:
    """Return the findings about each file, over the rows of all splits that come from it."""
    marks = template_marks(rendering.chat_template, tokenizer)
    findings: FileFindings = []
    for file in dict.fromkeys(files.values()):
        together = [name for name in SPLITS if files[name] == file]
        pairs = sorted(
            (pair for name in together for pair in zip(records[name], examples[name], strict=True)),
            key=lambda pair: pair[0].row,
        )
        for finding in audit([a for a, _ in pairs], [b for _, b in pairs], rendering.max_length, marks):
            if finding.code == "one-class" and "train" not in together:
                finding = replace(finding, severity="warning")
            findings.append((file, finding))
        findings += [(file, one) for one in untrained_references([b for _, b in pairs], rendering, tokenizer)]
    return findings


def report_and_refuse(findings: list[dict[str, Any]], allow: tuple[str, ...], progress: Progress) -> None:
    """Report every finding; those that --allow names become warnings.

    Raises:
        AuditRefused: one refuses the rows; `nothing-to-learn` is left to `drop_untrainable`, which knows the splits.
    """
    for finding in findings:
        if finding["code"] in allow:
            finding["severity"] = "warning"
        progress.say(f"{finding['file']}: {finding['message']} [{finding['code']}]")
    fatal = [found for found in findings if found["severity"] == "error" and found["code"] != "nothing-to-learn"]
    if fatal:
        codes = " ".join(dict.fromkeys(found["code"] for found in fatal))
        reasons = "; ".join(found["message"] for found in fatal)
        raise AuditRefused(f"{reasons} (to train all the same: --allow {codes})")


def drop_untrainable(examples: dict[str, list[Example]], max_length: int, allowed: bool) -> dict[str, list[Example]]:
    """Drop the examples that have no token to learn.

    Returns:
        The others.

    Raises:
        AuditRefused: a split has no others; `allowed` says that --allow named this finding, which does not help.
    """
    trainable = {name: [example for example in examples[name] if example.targets] for name in SPLITS}
    for name in SPLITS:
        if examples[name] and not trainable[name]:
            raise AuditRefused(
                f"no row of the {name} split has a token to learn: every answer is empty, cut off by --max-length "
                f"{max_length}, or a call that the chat template does not write"
                + (" (--allow cannot change that)" if allowed else "")
            )
    return trainable
