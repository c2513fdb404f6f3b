"""The page of the routing report: one file, which opens without a network.

The numbers are those of the JSON, which lies within; charts are Vega-Lite's,
made by Altair without data, which the browser fills in.
"""

import functools
import pathlib
from typing import Any

import altair as alt
import jinja2
import markupsafe
import vl_convert

from moejax.training import metrics

# Of load before and after capacity, of what is compared, of what is lost.
_BLUE, _PALE, _RED = "#0072b2", "#a3cde6", "#d55e00"
_HEIGHT = 220


def render(told: dict[str, Any]) -> str:
  """Returns the page of a report as HTML."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters["embedded"] = _embedded
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

  def chart(title, **options):
    return alt.Chart(
      data, title=title, width="container", height=_HEIGHT, **options
    )

  rank = alt.X("rank:Q", title="expert, the busiest first")
  expert = alt.X("expert:O", title="expert", sort=None)
  other = alt.Y("b:O", title="expert")
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
    """Load before capacity in pale, what is left in full color."""
    return alt.layer(
      chart("Load of each expert: edges, pale those beyond capacity")
      .mark_bar(color=_PALE)
      .encode(x, alt.Y("load:Q", title="edges"), tooltip=_tooltip()),
      alt.Chart(data)
      .mark_bar(color=_BLUE)
      .encode(x, alt.Y("after_capacity:Q", title=""), tooltip=_tooltip()),
    )

  def pairs(title, color):
    return (
      chart(title)
      .mark_rect()
      .encode(alt.X("a:O", title="expert"), other, color, tooltip=_every(color))
    )

  def _every(color):
    return ["a:O", "b:O", color.shorthand]

  band = chart("Load over training: from the least to the most loaded expert")
  step = alt.X("step:Q", title="step of training")
  made = {
    "loads": loads(expert),
    "loads_of_many": loads(rank),
    "training": chart("Load of each expert over training")
    .mark_rect()
    .encode(
      alt.X(
        "step:O", title="step of training", axis=alt.Axis(labelOverlap=True)
      ),
      alt.Y("expert:O", title="expert"),
      of_load,
      tooltip=["step:Q", "expert:O", "load:Q"],
    ),
    "training_of_many": alt.layer(
      band.mark_area(color=_PALE).encode(
        step,
        alt.Y("least:Q", title="load / mean"),
        alt.Y2("most:Q"),
      ),
      alt.Chart(data)
      .mark_area(color=_BLUE, opacity=0.4)
      .encode(step, alt.Y("tenth:Q"), alt.Y2("ninth:Q")),
      alt.Chart(data).mark_line(color=_BLUE).encode(step, alt.Y("median:Q")),
    ),
    "bits": alt.layer(
      chart("What each expert knows of the token; gray by luck")
      .mark_circle(color=_BLUE, size=45, opacity=1)
      .encode(
        alt.X("load:Q", title="load: edges"),
        alt.Y("bits:Q", title="bits"),
        tooltip=_tooltip("bits", "shuffled"),
      ),
      alt.Chart(data)
      .mark_point(color="gray", shape="cross", size=25)
      .encode(alt.X("load:Q"), alt.Y("shuffled:Q", title="")),
    ),
    "without": chart("What the loss gains without an expert, in nats a token")
    .mark_bar(color=_RED)
    .encode(
      alt.X("expert:O", title="expert", sort="-y"),
      alt.Y("loss_without:Q", title="nats"),
      tooltip=_tooltip("loss_without"),
    ),
    "margins": chart("How sure the router is: margin to the next expert")
    .mark_bar(color=_BLUE)
    .encode(
      alt.X("low:Q", title="logits", bin="binned"),
      alt.X2("high:Q"),
      alt.Y("count:Q", title="tokens"),
      tooltip=["low:Q", "high:Q", "count:Q"],
    ),
    "positions": chart("Where in a sentence each expert reads")
    .mark_rect()
    .encode(
      alt.X("from:O", title="position in the sentence, from"),
      alt.Y("expert:O", title="expert"),
      lift,
      tooltip=["expert:O", "from:Q", "to:Q", "edges:Q", "lift:Q"],
    ),
    "together": pairs("Which experts read the same tokens", lift),
    "alike_weights": pairs("How alike their weights are", cosine),
    "alike_outputs": pairs("How alike their outputs are", cosine),
  }
  return {name: each.to_dict() for name, each in made.items()}


def _tooltip(*more):
  names = ("expert", "load", "after_capacity", "importance", *more)
  return [f"{name}:Q" for name in names]


def _embedded(value):
  """Returns JSON without "<", by which a tag would begin."""
  return markupsafe.Markup(metrics.as_json(value).replace("<", "\\u003c"))
