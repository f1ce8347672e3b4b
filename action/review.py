"""What the action does on a pull request: check the plan, compare it with the base's, comment.

Standard library alone; `plan` and, to comment, GitHub's `gh` are run as commands. Everything comes
in by environment variables, as action.yml sets them. `--dry-run` prints the comment and calls no
`gh`, so that a team can try it at home:

    PLAN=plan.json BASE=origin/main python3 action/review.py --dry-run
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LONGEST = 65_000  # characters of a comment that GitHub takes, less a little


def main(arguments: list[str]) -> int:
    """Review; 0 where all passed, else the exit code of what did not (1, 3 or 4)."""
    given = os.environ
    plan = given.get("PLAN", "plan.json")
    base = base_of(given.get("BASE", ""), given.get("DEFAULT_BRANCH") or "main")
    folder = Path(given.get("FOLDER", "plan-review"))
    folder.mkdir(parents=True, exist_ok=True)

    if base and not commit(base):
        print(f"::error::the base {base} is not in this clone: fetch it, or mend the input")
        return 1
    check = run("plan", "check", plan)
    failed = "" if check.returncode == 0 else "check"
    code = check.returncode
    against = f"{base}:{repository_path(plan)}" if base and exists(base, plan) else ""
    body, differs = compared(plan, against, folder)
    if given.get("FAIL_ON") and against:
        gate = run("plan", "diff", against, plan, "--fail-on", given["FAIL_ON"])
        if gate.returncode:
            body += f"\n\n**The gate failed**\n{fenced(gate.stderr)}"
            failed, code = failed or "gate", code or gate.returncode
    if check.returncode:
        body += f"\n\n**`plan check` failed**\n{fenced(check.stderr or check.stdout)}"
    body = body[:LONGEST]
    if given.get("REPORT", "true") == "true":
        both = ([against] if against and differs else []) + [plan]
        made = run("plan", "report", *both, "-o", str(folder / "report.html"))
        if made.returncode:
            warn(f"no report: {first_line(made.stderr)}")
    (folder / "comment.md").write_text(body + "\n", encoding="utf-8")
    append(given.get("GITHUB_STEP_SUMMARY"), body + "\n")
    append(given.get("GITHUB_OUTPUT"), f"result={failed or 'passed'}\nfolder={folder}\n")

    if "--dry-run" in arguments:
        print(body)
    elif given.get("COMMENT", "true") == "true":
        comment(body)
    return code


def base_of(base: str, default: str) -> str:
    """The base; of a branch's first push, whose event has zeros for the commit before it, where it
    left the default branch; on that branch the parent. "" where nothing comes before."""
    if not re.fullmatch("0{40,64}", base):
        return base
    head = commit("HEAD")
    if run("git", "rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        run("git", "fetch", "--quiet", "--unshallow", "origin", head)
    there = f"refs/remotes/origin/{default}"
    run("git", "fetch", "--quiet", "origin", f"+refs/heads/{default}:{there}")
    trunks = [found for ref in (there, f"refs/heads/{default}") if (found := commit(ref))]
    left = run("git", "merge-base", "HEAD", trunks[0]).stdout.strip() if trunks else ""
    on_it = os.environ.get("GITHUB_REF_NAME", "") == default
    found = commit("HEAD^") if on_it or not left else left
    print(f"the branch is new: compared with {found[:12] or 'nothing, it has no commit before'}",
          file=sys.stderr)  # fmt: skip
    return found


def commit(name: str) -> str:
    """The commit of a name; "" where there is none."""
    return run("git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").stdout.strip()


def compared(plan: str, against: str, folder: Path) -> tuple[str, bool]:
    """The comment's text, whose first line is the tag, and whether the plans differ."""
    if not against:
        shown = run("plan", "show", plan)
        return f"{tag(plan)}\n### A new plan\n{fenced(shown.stdout or shown.stderr)}", True
    made = run("plan", "diff", against, plan, "--format", "md")
    if made.returncode:
        return f"{tag(plan)}\n### The plans cannot be compared\n{fenced(made.stderr)}", True
    document = run("plan", "diff", against, plan, "--json").stdout
    (folder / "diff.json").write_text(document, encoding="utf-8")
    return made.stdout.rstrip(), bool(json.loads(document)["differs"])


def tag(plan: str) -> str:
    """The first line of a plan's comment, as `plan diff --format md` has it."""
    clean = re.sub("-+", "-", re.sub("[^A-Za-z0-9._/-]", "_", plan))[:200]
    return f"<!-- meshwright-plan-diff {clean} -->"


def comment(body: str) -> None:
    """Write the comment, over the one with the same tag if there is one.

    A pull request of a fork has a token that may not: that is a warning, and the job's summary has
    the text.
    """
    number = pull_request()
    repository = os.environ.get("GITHUB_REPOSITORY", "")
    if number is None or not repository:
        print("no pull request: the summary has the comment")
        return
    first = body.splitlines()[0]
    path = f"repos/{repository}/issues/{number}/comments"
    listed = run("gh", "api", "--paginate", f"{path}?per_page=100",
                 "--jq", ".[] | {id, body}")  # fmt: skip
    if listed.returncode:
        warn(f"comments cannot be read: {first_line(listed.stderr)}")
        return
    rows = [json.loads(line) for line in listed.stdout.splitlines() if line.strip()]
    ours = [row["id"] for row in rows if row["body"].startswith(first)]
    where = f"repos/{repository}/issues/comments/{ours[0]}" if ours else path
    sent = subprocess.run(
        ["gh", "api", "--method", "PATCH" if ours else "POST", where, "--input", "-"],
        input=json.dumps({"body": body}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if sent.returncode:
        warn(f"no comment was written: {first_line(sent.stderr)}")
    else:
        print("updated the comment" if ours else "wrote a comment")


def pull_request() -> int | None:
    """The number in the event that started the job."""
    path = os.environ.get("GITHUB_EVENT_PATH", "")
    if not path or not Path(path).is_file():
        return None
    event = json.loads(Path(path).read_text(encoding="utf-8"))
    number = (event.get("pull_request") or event).get("number")
    return number if isinstance(number, int) else None


def exists(base: str, plan: str) -> bool:
    """Whether the base has a plan there."""
    return run("git", "cat-file", "-e", f"{base}:{repository_path(plan)}").returncode == 0


def repository_path(plan: str) -> str:
    """A path as git names it inside a revision: relative to here."""
    return plan if plan.startswith("./") else f"./{plan}"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command's output; one that is not installed has failed, with that said."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed\n")


def fenced(text: str) -> str:
    """Text as a code block that it cannot end, with nothing in it that shows letters in another
    order, or that a terminal obeys."""
    text = _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    longest = max((len(run) for run in re.findall("~+", text)), default=0)
    fence = "~" * max(4, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def first_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[0]


def warn(text: str) -> None:
    """A warning in the job's list; a new line would begin another command."""
    print("::warning::" + text.replace("%", "%25").replace("\r", " ").replace("\n", " "))


def append(path: str | None, text: str) -> None:
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
