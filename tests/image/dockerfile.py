"""A Dockerfile read stage by stage, and run without Docker.

Each stage is a root directory of its own, an overlay on the one that it is made FROM; each RUN is
executed in it by chroot, as the stage's user and with nothing of this machine's environment. What
an instruction means here is what Docker's reference says of the forms in use; any other form is an
error. Needs root.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from string import Template

from dockerfile_parse import DockerfileParser

# Mounts what a container has; they vanish with the namespace. $1: the root; $2: pairs of a path
# here and one inside, one a line. The rest is the command.
ENTER = """
set -e
root=$1 mounts=$2
shift 2
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
printf %s "$mounts" | while read -r here inside; do
    if [ -d "$here" ]; then mkdir -p "$root$inside"; else
        mkdir -p "$(dirname "$root$inside")"
        [ -e "$root$inside" ] || touch "$root$inside"
    fi
    mount --bind "$here" "$root$inside"
done
exec "$@"
"""
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]


@dataclass(frozen=True)
class Instruction:
    """One line of a stage, its flags apart: `COPY --from=a b c` has the flag `from` and `b c`."""

    name: str
    value: str
    flags: Mapping[str, str]

    @property
    def words(self) -> list[str]:
        return shlex.split(self.value)


@dataclass(frozen=True)
class Stage:
    """A stage as it is written."""

    name: str
    parent: str  # another stage's name, or an image's
    instructions: tuple[Instruction, ...]

    def of(self, name: str) -> list[Instruction]:
        """Its instructions of this name."""
        return [each for each in self.instructions if each.name == name]


def parse(path: Path) -> list[Stage]:
    """The stages of the file, in their order; one without a name has its number for one."""
    stages: list[Stage] = []
    for entry in DockerfileParser(fileobj=io.BytesIO(path.read_bytes())).structure:
        name, value = entry["instruction"], entry["value"]
        if name == "COMMENT":
            continue
        flags = {}
        while match := re.match(r"--([a-z]+)=(\S+)\s+", value):
            flags[match[1]] = match[2]
            value = value[match.end() :]
        if name == "FROM":
            parent, *alias = value.split()
            stages.append(Stage(alias[1] if alias else str(len(stages)), parent, ()))
        else:
            last = stages.pop()
            instruction = Instruction(name, value, flags)
            stages.append(replace(last, instructions=(*last.instructions, instruction)))
    return stages


@dataclass(frozen=True)
class Image:
    """A stage that has been made, and what is set in it."""

    root: Path
    layers: tuple[Path, ...]  # what each stage has added, the last first
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = "0"
    directory: str = "/"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        mounts: Mapping[Path, str],
        log: io.BufferedWriter,
    ) -> subprocess.Popen[bytes]:
        """The command in the image, as its user; `mounts` are paths here and inside."""
        lines = "".join(f"{here} {there}\n" for here, there in mounts.items())
        users = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
        [home] = [home for _, _, number, _, _, home, _ in users if number == self.user]
        as_user = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root)]
        inside = ["env", f"--chdir={self.directory}", *command]
        return subprocess.Popen(
            [*NAMESPACE, str(self.root), lines, *as_user, *inside],
            env={"HOME": home, **self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@dataclass(frozen=True)
class Builder:
    """What `docker build` is given.

    Args:
        context: the directory that COPY reads, less what its .dockerignore leaves out.
        images: the root directory for each image that is not a stage.
        scratch: where the stages and the logs of their commands go.
        arguments: as by --build-arg.
        secrets: as by --secret: files by id.
        network: the variables without which this machine's pip reaches no package index.
        shared: files and directories that these name, seen at the same paths inside.
    """

    context: Path
    images: Mapping[str, Path]
    scratch: Path
    arguments: Mapping[str, str]
    secrets: Mapping[str, Path]
    network: Mapping[str, str]
    shared: Sequence[Path]

    @contextlib.contextmanager
    def build(self, stages: Sequence[Stage]) -> Iterator[dict[str, Image]]:
        """Every stage, made in order; the roots are gone when the context is left."""
        made: dict[str, Image] = {}
        with contextlib.ExitStack() as mounted:
            for stage in stages:
                image = made.get(stage.parent)
                if image is None:
                    base = self.images[stage.parent]
                    image = Image(base, (base,), {"PATH": DEFAULT_PATH})
                image = self._on_top(image, stage.name, mounted)
                arguments: dict[str, str] = {}
                for instruction in stage.instructions:
                    image = self._apply(instruction, image, arguments, made)
                made[stage.name] = image
            yield made

    def _on_top(self, parent: Image, name: str, mounted: contextlib.ExitStack) -> Image:
        directory = self.scratch / name
        root, upper, work = (directory / part for part in ("root", "layer", "work"))
        for path in (root, upper, work):
            path.mkdir(parents=True)
        lower = ":".join(str(layer) for layer in parent.layers)
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)
        mounted.callback(subprocess.run, ["umount", "--lazy", str(root)], check=True)
        return replace(parent, root=root, layers=(upper, *parent.layers))

    def _apply(
        self,
        instruction: Instruction,
        image: Image,
        arguments: dict[str, str],
        made: Mapping[str, Image],
    ) -> Image:
        """The image after the instruction; `arguments` are those of its stage so far."""
        match instruction.name:
            case "ARG":
                name, _, default = instruction.value.partition("=")
                arguments[name] = self.arguments.get(name, default)
            case "ENV":
                pairs = dict(word.split("=", 1) for word in instruction.words)
                known = {**arguments, **image.environment}
                new = {name: Template(value).substitute(known) for name, value in pairs.items()}
                return replace(image, environment={**image.environment, **new})
            case "USER":
                return replace(image, user=instruction.value)
            case "WORKDIR":
                (image.root / instruction.value[1:]).mkdir(parents=True, exist_ok=True)
                return replace(image, directory=instruction.value)
            case "ENTRYPOINT":
                return replace(image, entrypoint=tuple(json.loads(instruction.value)))
            case "CMD":
                return replace(image, command=tuple(json.loads(instruction.value)))
            case "COPY":
                self._copy(instruction, image, made)
            case "RUN":
                self._run(instruction, image, arguments)
            case other:
                raise NotImplementedError(other)
        return image

    def _run(self, instruction: Instruction, image: Image, arguments: Mapping[str, str]) -> None:
        names = (Path("/etc/hosts"), Path("/etc/resolv.conf"))
        mounts = {path: str(path) for path in (*self.shared, *names)}
        if mount := instruction.flags.get("mount"):
            options = dict(option.split("=") for option in mount.split(","))
            if options.keys() != {"type", "id"} or options["type"] != "secret":
                raise NotImplementedError(mount)
            mounts[self.secrets[options["id"]]] = f"/run/secrets/{options['id']}"
        log = self.scratch / "build.log"
        with log.open("ab") as output:
            output.write(f"RUN {instruction.value}\n".encode())
            output.flush()
            command = ["/bin/sh", "-c", instruction.value]
            process = image.start(command, {**self.network, **arguments}, mounts, output)
        if process.wait() != 0:
            raise RuntimeError(f"RUN failed:\n{log.read_text()[-5000:]}")

    def _copy(self, instruction: Instruction, image: Image, made: Mapping[str, Image]) -> None:
        *sources, target = instruction.words
        owner = instruction.flags.get("chown", "0:0")
        source_root = self._context()
        if "from" in instruction.flags:
            source_root = made[instruction.flags["from"]].root
        destination = image.root / Path(image.directory, target).relative_to("/")
        into = target.endswith("/") or len(sources) > 1
        for source in sources:
            path = source_root / source.removeprefix("/")
            if path.is_dir():
                _copy_as(owner, path, ".", destination)
            elif into:
                _copy_as(owner, path.parent, path.name, destination)
            else:
                raise NotImplementedError(instruction.value)

    def _context(self) -> Path:
        """What the builder is sent."""
        sent = self.scratch / "context"
        if not sent.exists():
            for name in context_files(self.context):
                (sent / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.context / name, sent / name)
        return sent


def context_files(context: Path) -> list[str]:
    """The files that .dockerignore lets through; the last of its patterns that fits counts."""
    patterns = (context / ".dockerignore").read_text().split()

    def is_sent(path: str) -> bool:
        sent = True
        for pattern in patterns:
            parts = Path(path).parts
            above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
            name = pattern.removeprefix("!").removeprefix("**/")
            anywhere = "**/" in pattern
            if any(fnmatch(Path(each).name if anywhere else each, name) for each in above):
                sent = pattern.startswith("!")
        return sent

    found = []
    for directory, folders, files in os.walk(context):
        inside = Path(directory).relative_to(context)
        folders[:] = [name for name in folders if is_sent(str(inside / name))]
        found += [str(inside / name) for name in files if is_sent(str(inside / name))]
    return sorted(found)


def _copy_as(owner: str, source: Path, name: str, destination: Path) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    user, group = owner.split(":")
    ownership = ["--numeric-owner", f"--owner={user}", f"--group={group}"]
    with subprocess.Popen(
        ["tar", *ownership, "-C", source, "-c", name], stdout=subprocess.PIPE
    ) as packing:
        subprocess.run(
            ["tar", "--same-owner", "-C", destination, "-x"], stdin=packing.stdout, check=True
        )
    if packing.returncode != 0:
        raise RuntimeError(f"{source / name} could not be copied")
