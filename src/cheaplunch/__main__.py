"""The command line: verb → function. The only place that exits.

Exit status: 0 done; 1 failed; 2 the user's input is wrong, said in one line.
"""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cheaplunch as package
from cheaplunch import processes
from cheaplunch.cli import compare, prepare, score, train, use, whole
from cheaplunch.cli.flags import Parser
from cheaplunch.cli.screen import say
from cheaplunch.errors import Stopped, UserError


class Verb(NamedTuple):
    run: Callable[[Namespace], int | None]
    add_flags: Callable[[ArgumentParser], None]


VERBS = {
    "demo": Verb(whole.demo, whole.demo_flags),
    "weights": Verb(prepare.weights, prepare.weights_flags),
    "inspect": Verb(prepare.inspect, prepare.inspect_flags),
    "pick": Verb(prepare.pick, prepare.pick_flags),
    "synthesize": Verb(prepare.synthesize, prepare.synthesize_flags),
    "pretrain": Verb(train.pretrain, train.pretrain_flags),
    "finetune": Verb(train.finetune, train.finetune_flags),
    "evaluate": Verb(score.evaluate, score.evaluate_flags),
    "predict": Verb(use.predict, use.predict_flags),
    "serve": Verb(use.serve, use.serve_flags),
    "compare": Verb(compare.compare, compare.compare_flags),
    "reproduce": Verb(whole.reproduce, whole.reproduce_flags),
    "export": Verb(use.export, use.export_flags),
    "export-nnunet": Verb(prepare.export_nnunet, prepare.export_nnunet_flags),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        options = build_parser().parse_args([word for word in arguments if word != "--debug"])
        with contextlib.redirect_stdout(io.StringIO()) if processes.rank() else contextlib.nullcontext():
            _check_places(options)
            return VERBS[options.verb].run(options) or 0
    except UserError as error:
        if debug:
            raise
        return say(str(error), 2)
    except Stopped as stopped:
        return say(str(stopped), 1)
    except KeyboardInterrupt:
        return say("stopped; `cheaplunch finetune --resume` continues a run from its last checkpoint", 1)
    except Exception as error:
        if debug:
            raise
        return say(f"{type(error).__name__}: {error} (please report this; --debug shows where)", 1)


def build_parser() -> ArgumentParser:
    """One sub-parser a verb."""
    parser = Parser(prog="cheaplunch", description=package.__doc__)
    parser.add_argument("--version", action="version", version=package.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        about, debug = verb.run.__doc__, "--debug shows the traceback of an error."
        verb.add_flags(verbs.add_parser(name, help=about, description=about, epilog=debug))
    return parser


def _check_places(options: Namespace) -> None:
    """Raises UserError where nothing could be written in the end: mistakes before minutes of work, not after."""
    for name in ("out", "save_masks", "figure"):
        path: Path | None = getattr(options, name, None)
        blocking = next((parent for parent in path.parents if parent.is_file()), None) if path else None
        if blocking is not None:
            raise UserError(
                f"--{name.replace('_', '-')} {path}: {blocking} is a file, not a folder; give another place"
            )


if __name__ == "__main__":
    sys.exit(main())
