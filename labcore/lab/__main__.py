"""The command line behind make: report, studies, data, status, clean, keep, restore; train, for torchrun."""

import argparse
import signal
import sys

from labcore import LabError, nearest
from labcore.config import NOTEBOOKS, PROFILES, STUDIES
from labcore.lab import kept, pipeline
from labcore.lab.stale import State

COMMANDS = ("report", "studies", "data", "status", "clean", "keep", "restore", "train")


def chosen_studies(text: str) -> list[str]:
    """Return the studies that STUDIES= names, by number ("05"), notebook or stage; all where it is empty.

    Raises LabError for an unknown one.
    """
    stages = {key: stage for stage in STUDIES for key in (stage, NOTEBOOKS[stage], NOTEBOOKS[stage][:2])}
    names = text.replace(",", " ").split()
    for name in names:
        if name not in stages:
            raise LabError(f"{name!r} is no study: {nearest(name, stages)}")
    return [stages[name] for name in names] or list(STUDIES)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Return the exit status; an error is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m labcore.lab", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--profile", default="cpu", help=f"one of {', '.join(PROFILES)}")
    parser.add_argument("--data", default=None, help="cifar10, cifar100, digits, or a path to images")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--set", default="", dest="overrides", help="name=value pairs for the profile")
    parser.add_argument("--weights", default="", help="committed, or a folder with FP32 weights")
    parser.add_argument("--studies", default="", help="which studies, by number: '05 09'; all without it")
    parser.add_argument("--stage", choices=("fp32", "qat"), default="fp32", help="what train trains")
    options = parser.parse_args(arguments)
    try:
        state = State(options.profile, options.data, options.seed, options.overrides, options.weights)
        studies = chosen_studies(options.studies)
        if options.command == "status":
            for name, reason in state.status().items():
                print(f"{name:8} {'stale: ' + reason if reason else 'up to date'}")
        elif options.command == "clean":
            for folder in pipeline.clean(state):
                print(f"removed {folder.relative_to(state.root)}/")
        elif options.command == "keep":
            for path in kept.keep(state):
                print(f"kept {path.relative_to(state.root)}")
        elif options.command == "restore":
            if done := kept.restore(state):
                print(done)
        elif options.command == "data":
            from labcore.images.sources import fetch

            print(f"{fetch(state.source or 'cifar10', state.root)} is in {state.root / 'data'}")
        elif options.command == "train":
            from labcore.lab.launch import train  # imports torch
            from labcore.run import Run

            run = Run(state.profile, state.source, state.seed, state.root, state.weights)
            train(run, options.stage)
        else:
            kept.forget(state)
            pipeline.run(state, studies if options.command == "studies" else ())
    except (LabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # torch's words
            raise
        cause = " ".join(str(error).split())[-200:]
        print(f"error: not enough memory ({cause}): give smaller images, width or arch.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run again to go on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # end like Ctrl-C: kernels and unfinished files are removed
        # nohup ignores the second; what torchrun starts may wait for others, and must end at once.
        if signal.getsignal(number) is signal.SIG_DFL and sys.argv[1:2] != ["train"]:
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
