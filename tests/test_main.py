"""The command line: what it refuses, in one sentence, and what stays."""

import errno
import fcntl
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import types

import jax
import pytest

import moejax
from moejax import config as config_lib
from moejax.data import packing
from moejax.main import COMMANDS, main
from moejax.training import run, session, state

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def fails(capsys, small_flags, tmp_path):
  """Runs `moejax train` with changed flags; returns what it complains of."""
  workdir = tmp_path / "run"

  def fails(*flags, status=1):
    argv = ["moejax", "train", *small_flags, f"--workdir={workdir}", *flags]
    assert main(argv) == status
    errors = capsys.readouterr().err.splitlines()
    complaints = [line for line in errors if line.startswith("moejax: ")]
    assert len(complaints) == 1
    assert not any("Traceback" in line for line in errors)
    # What was wrong is not in the way of the next try.
    assert not (workdir / "config.json").exists()
    return complaints[0]

  return fails


def test_usage(capsys):
  assert main(["moejax"]) == 2
  assert main(["moejax", "--help"]) == 0
  assert capsys.readouterr().out.count("usage: moejax COMMAND") == 2


@pytest.mark.parametrize(
  "words, status, complaint",
  [
    ("trian", 2, "nearest is 'train'"),
    ("train --config=tiny", 2, "give --workdir=DIR"),
    ("train --workdir=x", 2, "give --config=NAME"),
    ("train --steps=10", 2, "by --config.train.steps=VALUE"),
    ("train --config=tiny --workdri=x", 2, "--workdri; the nearest is --work"),
    ("train extra", 2, "what is 'extra'"),
    ("train --workdir=x extra", 2, "what is 'extra'"),
    ("train --workdir=x --num_processes=two", 2, "give it as int or None"),
    ("eval --workdir=x --config.seed=3", 2, "--config.seed? A run keeps the"),
    ("eval --workdir=x --split=tset", 2, "(the nearest is 'test')"),
    ("eval --workdir=x --split=train --data=x", 2, "exclude each other"),
    ("eval --workdir=x", 1, "holds no config.json"),
    ("translate --workdir=x --beam=wide", 2, "give it as int"),
    ("plot --workdir=x", 1, "x holds no config.json"),
    ("plot --workdir=x --x=stepz", 1, "(the nearest is 'steps')"),
    ("plot --workdir=x --out=a.pgn", 1, "cannot write; the nearest is .png"),
    ("plot --workdir=x --out=y/a.png", 1, "there is no folder y; make it"),
    ("plot --workdir=x --out=gs://y/a.png", 1, "lies in a bucket"),
    ("watch --workdir=x", 1, "x holds no config.json"),
    ("watch --workdir=x --every=0", 2, "0.1 or more"),
  ],
)
def test_commands_that_are_refused(
  words, status, complaint, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert main(["moejax", *words.split()]) == status
  said = capsys.readouterr().err
  assert said.startswith("moejax: ") and complaint in said
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "command, flag",
  [("train", "workdir"), ("eval", "workdir"), ("plan", "topology")],
)
def test_help_lists_the_flags(command, flag, capsys):
  assert main(["moejax", command, "--help"]) == 0
  assert f"  --{flag}: " in capsys.readouterr().out


def test_help_lists_every_field(capsys):
  argv = ["moejax", "train", f"--config={ROOT}/configs/tiny.py", "--help"]
  assert main([*argv, "--config.model.moe.router=balanced"]) == 0
  said = capsys.readouterr().out
  for field, about in (
    ("train.steps=400", "updates in all, should the text not end before (int"),
    ("model.moe.router.kind=balanced", "softmax | top_k | noisy_top_k | bal"),
    ("model.moe.router.max_k=None", "(int or None; left out)"),
    ("model.moe.capacity_factor=1.25", "None drops nothing (float or None)"),
    ("model.lstm.hidden=None", "projection (int, 1 or more or None; left out)"),
    ("aux.z=None", "Mean over tokens of logsumexp"),
    ("model.hierarchical_moe.num_groups=...", "groups of experts"),
  ):
    line = re.search(f"  --config.{re.escape(field)}\n(.*)", said)
    assert line and about in line[1], field


def test_version(capsys):
  assert main(["moejax", "--version"]) == 0
  said = capsys.readouterr().out.split()
  assert said == ["moejax", importlib.metadata.version("moejax")]
  assert said[1] == moejax.__version__


@pytest.fixture
def config_of(monkeypatch, capsys):
  """Parses flags for configs/tiny.py; returns the config, or what is said."""
  ran = []

  def train(config: str, workdir: str, changes=()):
    ran.append(config_lib.load(config, changes).to_dict())

  monkeypatch.setitem(COMMANDS, "train", train)

  def config_of(*flags, file=ROOT / "configs" / "tiny.py"):
    argv = ["moejax", "train", f"--config={file}", "--workdir=x"]
    status = main([*argv, *flags])
    if status:
      return capsys.readouterr().err
    return ran.pop()

  return config_of


def option(name, value):
  """A flag that sets a field of the config."""
  return f"--config.{name}={value}"


LINEAR = {"kind": "linear", "num_experts": 4}
DEEP = {"kind": "feed_forward", "num_experts": 4, "hidden": (8, 8)}


@pytest.mark.parametrize(
  "name, text, value",
  [
    ("model.moe.capacity_factor", "None", None),
    ("model.moe.capacity_factor", "null", None),
    ("model.moe.group_size", "none", None),
    ("model.moe.group_size", "1e2", 100),
    ("optimizer.clip_norm", "5", 5.0),
    ("train.steps", "1e3", 1000),
    ("train.steps", "1_000", 1000),
    ("train.steps", "1000.0", 1000),
    ("train.microbatches", "2", 2),
    ("aux.z", "1e-3", 0.001),
    ("aux.load", "None", None),
    ("aux.scope", "group", "group"),
    ("model.moe.recompute", "true", True),
    ("model.moe.router.noise_epsilon", "0", 0.0),
    ("model.moe.router", "top_k", {"kind": "top_k", "k": 2}),
    ("model.moe.router", "switch", {"kind": "switch"}),
    (
      "model.moe.router",
      "{'kind': 'hash', 'k': 1e0}",
      {"kind": "hash", "k": 1},
    ),
    ("model.moe.experts", "linear", {"kind": "linear"}),
    ("model.moe.experts", f"[{LINEAR}, {DEEP}]", (LINEAR, DEEP)),
    ("model.moe.experts.hidden", "[64,64]", (64, 64)),
    ("model.moe.experts.hidden", "(64, 64)", (64, 64)),
    ("model.moe.experts.hidden", "64,64", (64, 64)),
    ("model.moe.experts.hidden", "64", 64),
    ("model.moe.experts.activation", "gelu", "gelu"),
    ("model.layers", "lstm,moe", ("lstm", "moe")),
    ("model.layers", "[lstm, moe]", ("lstm", "moe")),
    ("model.layers", "['lstm']", ("lstm",)),
    ("model.layers", "lstm", ("lstm",)),
    ("model.lstm", "{'hidden': 8}", {"hidden": 8}),
    ("model.one_expert", "identity", {"kind": "identity"}),
    ("layout", "{'mesh_shape': (2, -1, 1)}", {"mesh_shape": (2, -1, 1)}),
    ("layout.mesh_shape", "2,-1,1", (2, -1, 1)),
    ("data.train", "[a].txt, b.txt", "[a].txt, b.txt"),
    ("data.train", "None", "None"),
  ],
)
def test_any_field_is_an_option(config_of, name, text, value):
  found = config_of(option(name, text))
  for step in name.split("."):
    found = found[step]
  assert found == value and type(found) is type(value)


def test_flags_are_written_with_an_equals_sign_or_a_space(config_of):
  config = config_of(
    "--config.seed", "3", "--config.model.layers", "lstm", "moe", "lstm",
    "--config.model.moe.recompute", "-config.data.kind=text",
    "--config.data.train", "a.txt", "b.txt",
  )  # fmt: skip
  assert config["seed"] == 3 and config["model"]["moe"]["recompute"] is True
  assert config["model"]["layers"] == ("lstm", "moe", "lstm")
  assert config["data"]["train"] == "a.txt,b.txt"


@pytest.mark.parametrize("name", ["my run", "lr[1]"])
def test_paths_are_parted_by_commas_alone(name, tmp_path, capsys):
  assert main(["moejax", "plot", f"--workdir={tmp_path}/{name},x"]) == 1
  assert f"{tmp_path}/{name} holds no" in capsys.readouterr().err


def test_the_order_of_flags_does_not_matter(config_of):
  flags = [
    option("model.moe.experts[1].hidden", 16),
    option("model.moe.experts", [LINEAR, DEEP]),
    option("model.moe.router.max_k", 4),
    option("model.moe.router", "balanced"),
  ]
  moe = config_of(*flags)["model"]["moe"]
  assert moe["router"] == {"kind": "balanced", "k": 2, "max_k": 4}
  assert moe["experts"] == (LINEAR, DEEP | {"hidden": 16})
  assert config_of(*flags[::-1])["model"]["moe"] == moe
  # Of one field the last counts.
  assert config_of(option("seed", 1), option("seed", 2))["seed"] == 2


@pytest.mark.parametrize(
  "flags, complaint",
  [
    ("--config.train.steps=1.5", "--config.train.steps=1.5 .* give it as int"),
    ("--config.train.steps=", "give it as int"),
    ("--config.train.steps=inf", "give it as int"),
    ("--config.train.steps=True", "give it as int"),
    ("--config.train.steps", "steps is without a value; give it as int"),
    ("--config.train.steps=1 2", "what is '2'.* takes one value"),
    ("--config.model.moe.group_size=x", "give it as int, 1 or more or None"),
    ("--config.model.moe.recompute=yes", "give it as bool"),
    ("--config.model.moe.recompute now", "give it as bool"),
    ("--config.aux=0.1", "give it as dict, as in {'scope': ...}"),
    ("--config.model.moe.router=topk", "kind is 'topk'; .* is 'top_k'"),
    ("--config.model.moe.router=[2", "give it as dict, as in {'kind': ...}"),
    ("--config.model.moe.router={kind:", "as in {'kind': ...}"),
    ("--config.model.moe.router.max_k=4", "--config.model.moe.router=balanc"),
    ("--config.model.hierarchical_moe.primary.k=4", "of no kind"),
    ("--config.steps=10", "nearest is config.train.steps"),
    ("--config=10", "10: there is no such file"),
    ("--config.=10", "no field config.; the nearest"),
    ("--config.train.steps[0]=10", "no field config.train.steps.0.; the ne"),
    ("--steps=10", "no flag --steps; .* by --config.train.steps=VALUE"),
    ("--steps 10", "no flag --steps; .* by --config.train.steps=VALUE"),
    ("--layout=fsdp", "by --config.layout=VALUE"),
    ("--batch-size=1", "no flag --batch-size; .* by --config.data.batch_size"),
    ("--hidden=1", "model.lstm.hidden=VALUE or --config.model.moe.experts.hi"),
  ],
)
def test_options_that_cannot_be_read(config_of, flags, complaint):
  said = config_of(*flags.split(" "))
  assert said.startswith("moejax: ") and said.count("\n") == 1
  assert re.search(complaint, said), said


def test_a_config_takes_an_argument(config_of, tmp_path):
  path = tmp_path / "own.py"
  tiny = (ROOT / "configs" / "tiny.py").read_text()
  tiny = tiny.replace("get_config()", "get_config(seed)")
  path.write_text(tiny.replace('"seed": 0', '"seed": int(seed)'))
  assert config_of(file=f"{path}:7")["seed"] == 7
  assert config_of(option("seed", 8), file=f"{path}:7")["seed"] == 8
  assert "missing 1 required" in config_of(file=path)


@pytest.mark.parametrize(
  "flags, complaint",
  [
    (["--topology=v9:2x2"], "topology is 'v9'; choose one of 'v4'"),
    (["--topology=v5e:2by2"], "such as v5p:4x4x8"),
    (["--topology=cpu:8", "--layout=exprt"], "(the nearest is 'expert')"),
    (["--topology=cpu:3", "--layout=expert_model"], "by 2, which does not"),
    (["--suggest", "--layout=expert"], "at every layout, also at those of"),
    (["--topology=cpu:8", "--suggest"], "is unknown, so there is no fastest"),
    (["--topology=cpu:8", "--config.model.moe.router.k=9"], "k = 9 experts"),
  ],
)
def test_plans_that_cannot_be(flags, complaint, capsys, small_flags):
  assert main(["moejax", "plan", *small_flags, *flags]) == 1
  said = capsys.readouterr().err
  assert complaint in said and "Traceback" not in said


@pytest.mark.parametrize("layout", ["fsdp", "fspd"])
def test_a_layout_by_name_in_place_of_a_section(layout, capsys):
  """The configs of lm1b describe their own."""
  config = f"--config={ROOT}/configs/lm1b/moe_32.py"
  argv = ["moejax", "train", config, "--workdir=x"]
  assert main([*argv, f"--config.layout={layout}"]) == 1
  said = capsys.readouterr().err
  known = "config.data.vocab_file" in said and "config.layout" not in said
  assert known if layout == "fsdp" else "nearest is 'fsdp'" in said


def test_a_section_in_place_of_a_layouts_name(fails):
  section = "{'mesh_shape': (3, -1, 1), 'rules': {}}"
  assert "'own' splits the devices by 3" in fails(f"--config.layout={section}")
  said = fails("--config.layout={'mesh_shape': (3,", status=2)
  assert "cannot be read" in said and " or dict, as in {" in said


@pytest.mark.parametrize(
  "text", ["", "def get_config(:", "def get_config():\n  return 3\n"]
)
def test_configs_that_are_none(text, config_of, tmp_path):
  path = tmp_path / "own.py"
  path.write_text(text)
  said = config_of(file=path)
  assert "must define get_config()" in said and said.count("\n") == 1


def test_a_packaged_config_is_found_by_its_name(config_of, tmp_path, capsys):
  files = {
    "tiny": ROOT / "configs/tiny.py",
    "sotu/moe_32": ROOT / "configs/sotu/moe_32.py",
    "sotu/moe_32.py": ROOT / "configs/sotu/moe_32.py",
  }
  for name, file in files.items():
    assert config_of(file=name) == config_of(file=file)
  said = config_of(file="sotu/moe32")
  assert (
    "the nearest is sotu/moe_32, all are listed by `moejax configs`" in said
  )
  assert main(["moejax", "configs"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(config_lib.packaged()) > 30
  (about,) = (line for line in lines if line.startswith("tiny "))
  assert about.endswith("  A minute on two cores: the whole program, small.")


def test_a_file_comes_before_a_packaged_config(
  config_of, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  tiny = (ROOT / "configs" / "tiny.py").read_text()
  (tmp_path / "tiny").write_text(tiny.replace('"seed": 0', '"seed": 7'))
  assert config_of(file="tiny")["seed"] == 7


@pytest.mark.parametrize(
  "flags, complaint",
  [
    (["data.train=no.txt"], "no.txt: No such file or directory"),
    (["data.train=no*.txt"], "no*.txt matches no file"),
    (["data.kind=sotu"], "set config.data.kind=text"),
    (["data.kind=prose", "data.train="], "prose"),
    (["data.batch_size=100000"], "a batch of 100000 rows is more than"),
    (["data.batch_size=0"], "config.data.batch_size is 0; give 1 or more"),
    (["model.moe.group_size=100"], "group size 100 does not divide the 128"),
    (["model.moe.router.k=9"], "k = 9 experts per token, but there are 8"),
    (["model.moe.router.kind=top"], "nearest is 'top_k'"),
    (["model.moe.dispatch=gathr"], "choose one of 'auto', 'einsum', 'gather'"),
    (["model.moe.capacity_factor=-1.0"], "capacity factor -1.0"),
    (["model.moe.num_experts=6"], "which do not divide over 8 devices"),
    (["layout=exprt"], "choose one of 'replicated', 'expert', 'data_expert'"),
    (["optimizer.kind=adma"], "nearest is 'adam'"),
    (["optimizer.warmup_steps=0"], "warmup_steps = 0"),
    (["seed=-1"], "config.seed is -1; give 0 or more"),
    (["optimizer.peak=0.0"], "peak = 0.0"),
    (["model.moe.group_size=64"], "so that the number of groups is a multiple"),
    (["train.microbatches=3"], "3 microbatches do not divide the 8 rows"),
    (["data.batch_size=6"], "6 entries, which do not divide over 8 devices"),
  ],
)
def test_values_that_cannot_be(fails, flags, complaint):
  said = fails(*[f"--config.{flag}" for flag in flags])
  assert complaint in said


def test_a_model_without_room_is_refused_before_the_text_is_read(
  fails, monkeypatch
):
  monkeypatch.setattr(state, "device_memory", lambda device: 1000)
  monkeypatch.setattr(packing, "tokenize", None)
  assert "bytes of each device in layout 'expert', which has 1,000" in fails()


def test_a_step_without_room_is_refused_before_it_runs(fails, monkeypatch):
  """With the state before it, of which a CPU keeps a checkpoint."""
  monkeypatch.setattr(state, "device_memory", lambda device: 20_000)
  monkeypatch.setattr(session, "check_fits", lambda about: None)
  said = fails("--config.train.microbatches=1")
  assert re.search(
    r"a step, and the state before it that is being saved, take [\d,]+ bytes of"
    r" each device in layout 'expert', which has 20,000, though .* take only"
    r" [\d,]+; take more config.train.microbatches, which are 1, or look by"
    r" `moejax plan`",
    said,
  )


def test_a_step_that_the_compiler_refuses_has_no_room(fails, monkeypatch):
  def refuse():
    raise jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory"
      " in memory space hbm. Used 20.00G of 15.75G hbm."
    )

  lowered = types.SimpleNamespace(compile=refuse)
  monkeypatch.setattr(session, "lower", lambda *args: lowered)
  said = fails()
  assert "a step takes 21,474,836,480 bytes" in said
  assert "which has 16,911,433,728," in said


@pytest.fixture(scope="module")
def trained(whole, tmp_path_factory):
  """A run of one device; this process has eight."""
  return shutil.copytree(whole[0], tmp_path_factory.mktemp("trained") / "run")


def test_another_config_is_refused_and_shown(trained, small_flags, capsys):
  before = (trained / "config.json").read_text()
  argv = ["moejax", "train", *small_flags, f"--workdir={trained}"]
  assert main([*argv, "--config.model.width=16", "--config.seed=3"]) == 1
  said = capsys.readouterr().err
  assert "config.model.width: 8 there, 16 now" in said
  assert "config.seed: 0 there, 3 now" in said
  assert "steps" not in said
  assert (trained / "config.json").read_text() == before


def test_a_finished_run_is_known_by_its_text(
  trained, corpus, small_flags, tmp_path, capsys
):
  argv = ["moejax", "train", *small_flags, f"--workdir={trained}"]
  assert main([*argv, "--config.train.steps=3"]) == 0
  moved = tmp_path / "moved.txt"
  text = corpus.read_text(encoding="utf-8")
  moved.write_text(text, encoding="utf-8")
  assert main([*argv, f"--config.data.train={moved}"]) == 0
  assert capsys.readouterr().out.count("finished before: test perplex") == 2
  moved.write_text(f"{text}One more .\n", encoding="utf-8")
  assert main([*argv, f"--config.data.train={moved}"]) == 1
  assert "the text of train" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"test": 3}'])
def test_a_damaged_result_is_told_with_the_way_out(
  content, trained, small_flags, tmp_path, capsys
):
  workdir = shutil.copytree(trained, tmp_path / "run")
  (workdir / "result.json").write_text(content)
  argv = ["moejax", "train", *small_flags, f"--workdir={workdir}"]
  assert main(argv) == 1
  said = capsys.readouterr().err
  assert "result.json is damaged; remove it, and the same command" in said


@pytest.mark.parametrize("name", ["lock", "traceback.txt", "checkpoints"])
def test_nothing_is_written_through_a_link(
  name, trained, small_flags, tmp_path, capsys
):
  workdir = shutil.copytree(trained, tmp_path / "run")
  precious = tmp_path / "precious"
  if name == "checkpoints":
    shutil.move(workdir / name, precious)
  else:
    (workdir / name).unlink(missing_ok=True)
    precious.write_text("precious")
  (workdir / name).symlink_to(precious)
  argv = ["moejax", "train", *small_flags, f"--workdir={workdir}"]
  assert main([*argv, "--config.train.steps=0"]) == 1
  assert main(argv) == (0 if name == "traceback.txt" else 1)
  said = capsys.readouterr().err
  assert name == "traceback.txt" or f"{workdir / name} is a link" in said
  if name != "checkpoints":
    assert precious.read_text() == "precious"


@pytest.mark.parametrize(
  "name", ["lock", "config.json", "vocab.txt", "checkpoints/12/SHA256SUMS"]
)
def test_a_pipe_does_not_hang(name, trained, small_flags, tmp_path, capsys):
  workdir = shutil.copytree(trained, tmp_path / "run")
  (workdir / "result.json").unlink()
  (workdir / name).unlink()
  os.mkfifo(workdir / name)
  argv = ["moejax", "train", *small_flags, f"--workdir={workdir}"]
  assert main(argv) == 1
  assert f"{workdir / name} is a pipe where" in capsys.readouterr().err


def test_where_nothing_can_be_locked_it_says_so(
  trained, small_flags, monkeypatch, capsys
):
  def flock(*args):
    raise OSError(errno.ENOSYS, "Function not implemented")

  monkeypatch.setattr(fcntl, "flock", flock)
  argv = ["moejax", "train", *small_flags, f"--workdir={trained}"]
  assert main(argv) == 0
  said = capsys.readouterr().err
  assert f"{trained / 'lock'} cannot be locked" in said


@pytest.mark.parametrize("part", ["workdir", "config.data.train"])
def test_names_that_no_file_can_have(part, small_flags, capsys, tmp_path):
  argv = ["moejax", "train", *small_flags, f"--workdir={tmp_path}/run"]
  assert main([*argv, f"--{part}={tmp_path}/{'x' * 300}"]) == 1
  said = capsys.readouterr().err
  assert said.startswith(f"moejax: {tmp_path}/xxx")
  assert "File name too long; give a shorter path." in said


def test_eval_repeats_the_test(trained, capsys):
  want = json.loads((trained / "result.json").read_text())
  assert main(["moejax", "eval", f"--workdir={trained}"]) == 0
  said = capsys.readouterr().out
  assert f"perplexity {want['test']['perplexity']:,.2f} per word" in said
  assert f"(checkpoint of step {want['best_step']})" in said
  assert run.recall(trained).layout.name == "expert"
  assert run.recall(trained, "fsdp").layout.name == "fsdp"


def test_eval_says_where_the_best_is_damaged(trained, tmp_path, capsys):
  best = json.loads((trained / "result.json").read_text())["best_step"]
  workdir = shutil.copytree(trained, tmp_path / "run")
  score = workdir / "checkpoints" / str(best) / "metrics" / "metrics"
  score.write_bytes(score.read_bytes().replace(b".", b"1", 1))
  assert main(["moejax", "eval", f"--workdir={workdir}"]) == 0
  out, err = capsys.readouterr()
  assert f"(checkpoint of step {best - 3})" in out
  assert f"of step {best}, is damaged or gone" in err
  assert f"best that is left is of step {best - 3}." in err


def test_a_result_says_where_the_best_is_gone(
  trained, small_flags, tmp_path, capsys
):
  workdir = shutil.copytree(trained, tmp_path / "run")
  result = json.loads((workdir / "result.json").read_text())
  (workdir / "result.json").unlink()
  validation = {"step": 3, "split": "validation", "perplexity": 2.0}
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps(validation) + "\n")
  assert main(["moejax", "train", *small_flags, f"--workdir={workdir}"]) == 0
  said = capsys.readouterr().out
  assert "left, as that of step 3 is damaged or gone (step 12 of 12)" in said
  left = json.loads((workdir / "result.json").read_text())
  assert left["lost_best_step"] == 3
  assert left["best_step"] == result["best_step"] == 12
  assert "lost_best_step" not in result


def test_eval_reads_other_files(trained, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "b, c.txt").write_text("The zyzzyva of the Congress .\n")
  for name in ("a.txt", "d.txt"):
    (tmp_path / name).write_text("Fellow citizens\n")
  argv = ["moejax", "eval", f"--workdir={trained}", "--data=[ad].txt"]
  assert main([*argv, "b, c.txt"]) == 0
  # Six, two and two words, and three </S>.
  said = capsys.readouterr().out
  found = re.search(r"\(13 words\), .*byte, ([\d.]+)% of the words unk", said)
  assert 5 < float(found[1]) < 40
  assert main([*argv, "--data", "no*.txt"]) == 1
  assert "no*.txt matches no file" in capsys.readouterr().err


def test_a_device_that_fills_up(trained, monkeypatch, capsys):
  def fill_up(workdir: str):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory: 123 bytes.\nAlloc:")

  monkeypatch.setitem(COMMANDS, "eval", fill_up)
  assert main(["moejax", "eval", f"--workdir={trained}"]) == 1
  said = capsys.readouterr().err
  assert said.startswith("moejax: a device has no room left (RESOURCE")
  assert "123 bytes.); take more config.train.microbatches" in said
  assert "Alloc" not in said
  assert "Alloc" in (trained / "traceback.txt").read_text()


def test_eval_without_a_checkpoint(trained, tmp_path, capsys):
  for name in ("config.json", "vocab.txt"):
    (tmp_path / name).write_bytes((trained / name).read_bytes())
  assert main(["moejax", "eval", f"--workdir={tmp_path}"]) == 1
  assert "has no checkpoint yet" in capsys.readouterr().err
