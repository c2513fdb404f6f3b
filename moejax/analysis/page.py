"""The page of the routing report: one file, which opens without a network.

The numbers are those of the JSON, which lies within; charts are Vega-Lite's,
made by Altair without data, which the browser fills in.
"""

import functools
import pathlib
from typing import Any

import altair as alt
import jinja2
import vl_convert

from moejax.analysis import colors
from moejax.training import metrics

_HEIGHT = 220
_SPARSE_LABELS = alt.Axis(labelOverlap=True)


def render(told: dict[str, Any]) -> str:
  """Returns the page of a report as HTML."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
  )
  # The filter `tojson` escapes what HTML would take for its own.
  environment.policies["json.dumps_function"] = metrics.as_json
  environment.policies["json.dumps_kwargs"] = {}
  return environment.get_template("report.html").render(
    told=told,
    charts=charts(),
    library=_library(),
  )


@functools.cache
def _library() -> str:
  """Returns Vega, without what would end the script that it is in."""
  return vl_convert.javascript_bundle().replace("</script", "<\\/script")


@functools.cache
def charts() -> dict[str, dict[str, Any]]:
  """Returns specifications of charts by name; their data is named "table"."""
  data = alt.NamedData("table")
  chart = alt.Chart(data, width="container", height=_HEIGHT)
  expert = alt.X("expert:O", title="expert", axis=_SPARSE_LABELS)
  experts = alt.Y("expert:O", title="expert", axis=_SPARSE_LABELS)
  rank = alt.X(
    "rank:Q",
    title="expert, the busiest first",
    scale=alt.Scale(nice=False, zero=True),
  )
  step = alt.X("step:Q", title="step of training")
  of_load = alt.Color(
    "load:Q", title="load / mean", scale=alt.Scale(scheme="viridis")
  )
  lift = alt.Color(
    "lift:Q",
    title="times as often",
    scale=alt.Scale(type="log", scheme="blueorange", domainMid=1),
  )
  cosine = alt.Color(
    "cosine:Q",
    title="cosine",
    scale=alt.Scale(scheme="blueorange", domainMid=0),
  )

  def loads(x):
    edges = alt.Y("load:Q", title="edges")
    left = alt.Y("after_capacity:Q", title="")
    return alt.layer(
      chart.mark_bar(color=colors.PALE_SPARSE).encode(
        x, edges, tooltip=_tooltip()
      ),
      chart.mark_bar(color=colors.SPARSE).encode(x, left, tooltip=_tooltip()),
      title="Load of each expert: edges, pale those beyond capacity",
    )

  def cells(title, x, y, color, *told):
    """A cell for each pair of x and y; where one points, `told` beside it."""
    told = [x.shorthand, y.shorthand, *told, color.shorthand]
    return (
      chart.mark_rect()
      .encode(x, y, color, tooltip=told)
      .properties(title=title)
    )

  def pairs(title, color):
    one = alt.X("a:O", title="expert", axis=_SPARSE_LABELS)
    other = alt.Y("b:O", title="expert", axis=_SPARSE_LABELS)
    return cells(title, one, other, color)

  made = {
    "loads": loads(expert),
    "loads_of_many": loads(rank),
    "training": cells(
      "Load of each expert over training",
      alt.X("step:O", title="step of training", axis=_SPARSE_LABELS),
      experts,
      of_load,
    ),
    "training_of_many": alt.layer(
      chart.mark_area(color=colors.PALE_SPARSE).encode(
        step, alt.Y("least:Q", title="load / mean"), alt.Y2("most:Q")
      ),
      chart.mark_area(color=colors.SPARSE, opacity=0.4).encode(
        step, alt.Y("tenth:Q"), alt.Y2("ninth:Q")
      ),
      chart.mark_line(color=colors.SPARSE).encode(step, alt.Y("median:Q")),
      title="Load over training: least, most and median expert, and tenths",
    ),
    "bits": alt.layer(
      chart.mark_circle(color=colors.SPARSE, size=45, opacity=1).encode(
        alt.X("load:Q", title="load: edges"),
        alt.Y("bits:Q", title="bits"),
        tooltip=_tooltip("bits", "shuffled"),
      ),
      chart.mark_point(color=colors.GRAY, shape="cross", size=25).encode(
        alt.X("load:Q"), alt.Y("shuffled:Q", title="")
      ),
      title="What each expert knows of the token; gray by luck",
    ),
    "without": chart.mark_bar(color=colors.DENSE)
    .encode(
      alt.X("expert:O", title="expert", sort="-y", axis=_SPARSE_LABELS),
      alt.Y("loss_without:Q", title="nats"),
      tooltip=_tooltip("loss_without"),
    )
    .properties(
      title="How much the loss rises without an expert, nats a token"
    ),
    "margins": chart.mark_bar(color=colors.SPARSE)
    .encode(
      alt.X("low:Q", title="logits", bin="binned"),
      alt.X2("high:Q"),
      alt.Y("count:Q", title="tokens"),
      tooltip=["low:Q", "high:Q", "count:Q"],
    )
    .properties(title="How sure the router is: margin to the next expert"),
    "positions": cells(
      "Where in a sentence each expert reads",
      alt.X("from:O", title="position in the sentence, from"),
      experts,
      lift,
      "to:Q",
      "edges:Q",
    ),
    "labels": cells(
      "What each expert reads, by ",
      alt.X("label:N", title="", axis=alt.Axis(labelLimit=90)),
      experts,
      lift,
      "edges:Q",
    ),
    "together": pairs("Which experts read the same tokens", lift),
    "alike_weights": pairs("How alike their weights are", cosine),
    "alike_outputs": pairs("How alike their outputs are", cosine),
  }
  return {name: each.to_dict() for name, each in made.items()}


def _tooltip(*more):
  names = ("expert", "load", "after_capacity", "importance", *more)
  return [f"{name}:Q" for name in names]
