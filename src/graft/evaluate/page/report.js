"use strict";
// Draws each chart of the page with uPlot, in the colours of the page, and again when the theme or the width changes.
(() => {
  const charts = [];

  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const WHOLE = [0, 1, 2, 3, 4, 5, 6].flatMap(power => [1, 2, 5].map(factor => factor * 10 ** power));

  const short = value => {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
    return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 7 : 4 });
  };

  // Where the cursor stands no series need have a value: evaluation is logged less often than training.
  function nearest(plot, at, index) {
    const values = plot.data[at];
    for (let far = 0; far < values.length; far++) {
      if (values[index - far] != null) return index - far;
      if (values[index + far] != null) return index + far;
    }
    return index;
  }

  const last = values => values.findLast(value => value != null);

  function line(series) {
    const stroke = colour(`--s${series.colour}`);
    return {
      label: series.name,
      stroke,
      width: series.dashed ? 2.5 : 1.5,
      alpha: series.faint ? 0.65 : 1,
      dash: series.dashed ? [6, 4] : undefined,
      spanGaps: true,
      points: { show: series.dashed || series.steps.length < 2, size: 8, fill: stroke },
      value: (plot, value, at, index) => short(index == null ? last(plot.data[at]) : value),
    };
  }

  function draw(chart) {
    const { box, spec } = chart;
    const width = box.clientWidth;
    const height = Math.max(260, Math.min(400, Math.round(width * 0.5)));
    const axis = {
      stroke: colour("--soft"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
      labelFont: "12px system-ui, sans-serif",
      labelSize: 18,
      values: (_, ticks) => ticks.map(tick => (tick === null ? "" : short(tick))),
    };
    if (chart.plot) chart.plot.destroy();
    chart.width = width;
    chart.plot = new uPlot({
      width,
      height,
      padding: [8, 14, 0, 0],
      scales: { x: { time: false }, y: { distr: spec.log ? 3 : 1 } },
      axes: [{ ...axis, label: spec.x, size: 30, ...(spec.whole ? { incrs: WHOLE } : {}) }, { ...axis, label: spec.y, size: 46 }],
      cursor: { dataIdx: nearest },
      series: [
        { label: spec.x, value: (plot, value, at, index) => short(index == null ? last(plot.data[at]) : value) },
        ...spec.series.map(line),
      ],
      legend: { markers: { fill: null, dash: (_, at) => (spec.series[at - 1].dashed ? "dotted" : "solid") } },
    }, uPlot.join(spec.series.map(series => [series.steps, series.values])), box);
  }

  for (const box of document.querySelectorAll(".chart")) {
    const spec = JSON.parse(box.querySelector("script").textContent);
    const chart = { box, spec, plot: null, width: 0 };
    charts.push(chart);
    draw(chart);
    new ResizeObserver(() => { if (box.clientWidth !== chart.width) draw(chart); }).observe(box);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
})();
