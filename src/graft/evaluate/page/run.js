"use strict";
// Shows a run from the lines of its logs: those in the page, and those that come over the event stream while it trains.
(() => {
  const { make, digits, plain, heat } = graftPage;
  const given = JSON.parse(document.getElementById("run-data").textContent);
  const steps = new Map(), evals = new Map(), spectra = new Map();
  let state = given.state, connection = given.live ? "waiting" : "none";
  const view = { metric: "effective_rank", layer: null, step: null };

  const part = name => document.querySelector(`[data-part="${name}"]`);
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const show = (name, wanted) => { const box = part(name); if (box) box.closest("section").hidden = !wanted; };

  // Numbers as a reader wants them.
  const whole = value => (value == null ? "–" : digits(value, 0));
  const percent = value => (value == null ? "–" : `${digits(100 * value, value < 0.0995 ? 1 : 0)} %`);
  const bytes = value => {
    if (value == null) return "–";
    return value < 2 ** 30 ? `${digits(value / 2 ** 20, 0)} MiB` : `${digits(value / 2 ** 30, 2)} GiB`;
  };
  const duration = seconds => {
    const all = Math.round(seconds);
    if (all < 60) return `${all} s`;
    if (all < 3600) return `${Math.floor(all / 60)} min ${String(all % 60).padStart(2, "0")} s`;
    return `${Math.floor(all / 3600)} h ${String(Math.floor((all % 3600) / 60)).padStart(2, "0")} min`;
  };

  // What the lines say.
  function take(lines) {
    for (const line of lines.timings ?? []) steps.set(line.step, { ...(steps.get(line.step) ?? {}), timing: line, step: line.step });
    for (const line of lines.metrics ?? []) {
      if ("eval_loss" in line) evals.set(line.step, line);
      else steps.set(line.step, { ...(steps.get(line.step) ?? {}), ...line });
    }
    for (const line of lines.spectra ?? []) spectra.set(line.step, line);
  }
  const rows = () => [...steps.values()].filter(row => "learning_rate" in row).sort((a, b) => a.step - b.step);

  // Points in time where the gradient was far larger than just before.
  const SPIKE = 4, BEFORE = 50, FEWEST = 20;
  function spikes(found) {
    const list = [], recent = [];
    for (const row of found) {
      if (row.grad_norm == null) continue;
      if (recent.length >= FEWEST) {
        const sorted = [...recent].sort((a, b) => a - b);
        const median = sorted[sorted.length >> 1];
        if (median > 0 && row.grad_norm > SPIKE * median) list.push({ step: row.step, norm: row.grad_norm, times: row.grad_norm / median });
      }
      recent.push(row.grad_norm);
      if (recent.length > BEFORE) recent.shift();
    }
    return list;
  }

  // Panels.
  const smooth = values => {
    let mean = null, weight = 0;
    return values.map(value => {
      if (value == null) return null;
      mean = 0.9 * (mean ?? 0) + 0.1 * value;
      weight = 0.9 * weight + 0.1;
      return mean / weight;
    });
  };
  const speed = field => row => (row.timing?.seconds && row.timing[field] != null ? row.timing[field] / row.timing.seconds : null);

  function perGroup(found, field, total) {
    const names = Object.keys(found.at(-1)?.groups ?? {});
    const lines = names.map((name, at) => ({ label: name, key: at + 1, values: found.map(row => row.groups?.[name]?.[field] ?? null) }));
    const one = { label: names.length ? "all" : "", key: 0, values: found.map(row => row[total]) };
    if (field !== "learning_rate") return [one, ...lines];
    const differ = found.some(row => names.some(name => row.groups?.[name]?.learning_rate !== row.learning_rate));
    return differ ? lines : [{ ...one, label: "" }];
  }

  const PANELS = [
    { part: "loss", title: "Loss", wide: true, format: plain, lines: found => {
      const losses = found.map(row => row.loss);
      const marked = found.length > 30;
      const lines = [{ label: "each step", key: 0, faint: marked, values: losses }];
      if (marked) lines.push({ label: "smoothed", key: 0, bold: true, values: smooth(losses) });
      if (evals.size) {
        const list = [...evals.values()].sort((a, b) => a.step - b.step);
        lines.push({ label: "evaluation", key: 1, dashed: true, steps: list.map(line => line.step), values: list.map(line => line.eval_loss) });
      }
      return lines;
    } },
    { part: "course", title: "Learning rate", format: plain, lines: found => perGroup(found, "learning_rate", "learning_rate") },
    { part: "course", title: "Gradient norm", unit: "before clipping, log scale", log: true, format: plain, lines: found => perGroup(found, "grad_norm", "grad_norm") },
    { part: "course", title: "Speed", unit: "tokens per second", zero: true, format: whole, lines: found => [
      { label: "real", key: 0, values: found.map(speed("num_tokens")) },
      { label: "with padding", key: 7, values: found.map(speed("num_padded_tokens")) },
    ] },
    { part: "course", title: "Time of a step", unit: "seconds", zero: true, format: plain, lines: found => [
      { label: "", key: 6, values: found.map(row => row.timing?.seconds ?? null) },
    ] },
    { part: "course", title: "Achieved / limit", unit: "of the machine's own rate in products", zero: true, format: percent, lines: found => [
      { label: "", key: 2, values: found.map(row => row.timing?.achieved ?? null) },
    ] },
    { part: "course", title: "Memory", unit: state?.device === "cuda" ? "allocated on the GPU" : "of the process", zero: true, format: bytes, lines: found => [
      { label: "now", key: 0, values: found.map(row => row.timing?.memory_bytes ?? null) },
      { label: "peak", key: 3, values: found.map(row => row.timing?.peak_memory_bytes ?? null) },
      ...(state?.predicted_memory_bytes ? [{ label: "predicted", key: 5, dashed: true, bare: true, values: found.map(() => state.predicted_memory_bytes) }] : []),
    ] },
  ];

  // Ticks of memory at whole numbers of MiB and GiB.
  const BINARY = [20, 30].flatMap(power => [1, 2, 4, 8, 16, 32, 64, 128, 256, 512].map(factor => factor * 2 ** power));

  const last = values => values.findLast(value => value != null);

  function nearest(plot, at, index) {
    const values = plot.data[at];
    for (let far = 0; far < values.length; far++) {
      if (values[index - far] != null) return index - far;
      if (values[index + far] != null) return index + far;
    }
    return index;
  }

  function options(panel, lines, width) {
    const axis = {
      stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif",
    };
    const shown = values => values.map(value => (value == null ? "" : panel.format(value).replace(/(\.\d*?)0+(?=$| |e)/, "$1").replace(/\.(?=$| |e)/, "")));
    return {
      width,
      height: panel.wide ? Math.max(220, Math.min(340, Math.round(width * 0.36))) : 168,
      padding: [8, 26, 0, 0],
      legend: { show: false },
      scales: {
        x: { time: false },
        y: panel.log ? { distr: 3 } : panel.zero ? { range: (_, low, high) => [0, (high || 1) * 1.08] } : {},
      },
      axes: [
        { ...axis, size: 28, values: (_, ticks) => ticks.map(tick => (Number.isInteger(tick) ? whole(tick) : "")) },
        { ...axis, size: 62, values: (_, ticks) => shown(ticks), ...(panel.format === bytes ? { incrs: BINARY } : {}) },
      ],
      cursor: { dataIdx: nearest, sync: { key: "run" }, points: { size: 6 }, drag: { x: true, y: false } },
      hooks: { setCursor: [plot => tell(panel, plot.cursor.idxs)], drawClear: [plot => mark(panel, plot)] },
      series: [{}, ...lines.map(line => {
        const stroke = colour(`--s${line.key % 8}`);
        return {
          stroke, width: line.bold || line.dashed ? 2.25 : 1.5, alpha: line.faint ? 0.35 : 1, dash: line.dashed ? [6, 4] : undefined, spanGaps: true,
          points: { show: (line.dashed && !line.bare) || line.values.length < 2, size: 7, fill: stroke },
        };
      })],
    };
  }

  // Steps that were skipped, and spikes, as lines through the loss.
  function mark(panel, plot) {
    if (!panel.marks?.length) return;
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = colour("--warn");
    ctx.globalAlpha = 0.5;
    ctx.lineWidth = devicePixelRatio;
    for (const step of panel.marks) {
      const x = Math.round(plot.valToPos(step, "x", true)) + 0.5;
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
    }
    ctx.restore();
  }

  function tell(panel, places) {
    panel.keys.replaceChildren(...panel.drawn.map((line, at) => {
      const key = make("span");
      key.style.setProperty("--key", `var(--s${line.key % 8})`);
      key.append(make("i", line.dashed ? "dashed" : line.faint ? "faint" : ""));
      if (line.label) key.append(line.label);
      const values = panel.plot?.data[at + 1] ?? [];
      const place = places?.[at + 1];
      key.append(make("b", "", panel.format(place == null ? last(values) : values[place])));
      return key;
    }));
    if (panel.marks?.length) {
      const key = make("span", "", "skipped or spike");
      key.style.setProperty("--key", "var(--warn)");
      key.prepend(make("i", "tick"));
      panel.keys.append(key);
    }
  }

  function place(panel) {
    const figure = make("figure", panel.wide ? "panel wide" : "panel");
    if (panel.part !== "loss") figure.append(make("figcaption", "", panel.title));
    if (panel.unit && panel.part !== "loss") figure.querySelector("figcaption").append(make("small", "", panel.unit));
    panel.keys = figure.appendChild(make("div", "keys"));
    panel.box = figure.appendChild(make("div", "plot"));
    part(panel.part).append(figure);
    new ResizeObserver(() => { if (panel.box.clientWidth !== panel.width) draw(panel, true); }).observe(panel.box);
  }

  function draw(panel, anew) {
    const found = rows();
    if (!found.length) return;
    const lines = panel.lines(found).filter(line => line.values.some(value => value != null && (value > 0 || !panel.log)));
    const at = found.map(row => row.step);
    const data = uPlot.join(lines.map(line => [line.steps ?? at, panel.log ? line.values.map(value => (value > 0 ? value : null)) : line.values]));
    const shape = lines.map(line => `${line.label}/${line.key}/${line.values.length < 2}`).join();
    panel.drawn = lines;
    panel.marks = panel.part === "loss" ? [...found.filter(row => row.skipped), ...spikes(found)].map(row => row.step) : [];
    if (!lines.length) { panel.keys.closest("figure").hidden = true; return; }
    panel.keys.closest("figure").hidden = false;
    if (!panel.plot || anew || shape !== panel.shape) {
      panel.plot?.destroy();
      panel.width = panel.box.clientWidth;
      panel.shape = shape;
      panel.plot = new uPlot(options(panel, lines, panel.width), data, panel.box);
    } else panel.plot.setData(data);
    tell(panel, null);
  }

  // The head and the tiles.
  function timeLeft(found) {
    const steps = found.filter(row => row.timing).slice(-50);
    if (steps.length < 2 || !state.num_steps) return null;
    // By the clock where there is one, so that evaluations and checkpoints count.
    const first = steps[0], end = steps.at(-1);
    const spent = end.timing.clock_seconds && first.timing.clock_seconds ? end.timing.clock_seconds - first.timing.clock_seconds
      : steps.slice(1).reduce((sum, row) => sum + row.timing.seconds, 0);
    return (spent / (end.step - first.step)) * (state.num_steps - end.step);
  }

  const PHASES = { waiting: "waiting", preparing: "preparing data", loading: "loading", training: "training", writing: "writing the result", finished: "finished",
    stopped: "stopped, state saved", failed: "failed", lost: "connection lost, trying again", running: "interrupted" };

  function head(found) {
    const box = part("overview").querySelector(".run-head");
    const phase = connection === "lost" ? "lost" : state.phase ?? "waiting";
    const pill = make("span", "pill", PHASES[phase] ?? phase);
    pill.dataset.phase = phase;
    const done = found.at(-1)?.step ?? state.first_step ?? 0;
    const said = [];
    if (phase === "preparing" && state.preparing) said.push(`${state.preparing[0].toLocaleString("en")} rows`);
    if (phase === "loading" && state.loading?.[1]) said.push(`${bytes(state.loading[0])} of ${bytes(state.loading[1])}`);
    if (state.num_steps) said.push(`step ${whole(done)} of ${whole(state.num_steps)}`);
    const left = phase === "training" ? timeLeft(found) : null;
    if (left != null) said.push(`${duration(left)} left`);
    if (state.error) said.push(state.error);
    const line = make("div", "progress"), bar = line.appendChild(make("div"));
    bar.style.width = `${state.num_steps ? Math.min(100, (100 * done) / state.num_steps) : 0}%`;
    line.setAttribute("role", "progressbar");
    line.setAttribute("aria-valuenow", String(done));
    line.setAttribute("aria-valuemax", String(state.num_steps ?? 0));
    box.replaceChildren(pill, make("span", "said", said.join(" · ")), line);
    if (given.live) document.title = state.num_steps ? `${Math.floor((100 * done) / state.num_steps)} % · ${state.name}` : state.name;
  }

  function tile(name, value, under, unit, warn) {
    const box = make("div", warn ? "tile warn" : "tile");
    box.append(make("div", "name", name));
    const number = box.appendChild(make("div", "value", value));
    if (unit) number.append(make("small", "", unit));
    box.append(make("div", "under", under || ""));
    return box;
  }

  function tiles(found) {
    const end = found.at(-1), recent = found.filter(row => row.timing).slice(-20);
    const rate = field => {
      const seconds = recent.reduce((sum, row) => sum + row.timing.seconds, 0);
      return seconds ? recent.reduce((sum, row) => sum + (row.timing[field] ?? 0), 0) / seconds : null;
    };
    const told = given.live ? null : state.speed;
    const achieved = told?.achieved ?? (recent.length ? recent.reduce((sum, row) => sum + (row.timing.achieved ?? 0), 0) / recent.length : null);
    const list = [...evals.values()].sort((a, b) => a.step - b.step);
    const best = list.filter(line => line.eval_loss != null).reduce((low, line) => (low && low.eval_loss <= line.eval_loss ? low : line), null);
    const skipped = found.filter(row => row.skipped).length;
    const speedNow = told?.tokens_per_second ?? rate("num_tokens"), padded = told?.padded_tokens_per_second ?? rate("num_padded_tokens");
    const peak = Math.max(state.peak_memory_bytes ?? 0, ...recent.map(row => row.timing.peak_memory_bytes ?? 0)) || null;
    const smoothed = last(smooth(found.map(row => row.loss)));
    const made = [
      tile("Training loss", plain(smoothed), end ? `last step ${plain(end.loss)}` : "", "smoothed"),
      ...(list.length ? [tile("Evaluation loss", plain(list.at(-1).eval_loss), best ? `best ${plain(best.eval_loss)} at step ${whole(best.step)}` : "")] : []),
      tile("Speed", whole(speedNow), padded == null ? "" : `${whole(padded)} with padding`, "tokens/s"),
      tile("Achieved / limit", percent(achieved), state.product_flops_per_second ? `of ${digits(state.product_flops_per_second / 1e9, 1)} GFLOP/s in products` : "of its rate in products"),
      tile("Memory", bytes(end?.timing?.memory_bytes ?? peak), state.predicted_memory_bytes ? `peak ${bytes(peak)}, predicted ${bytes(state.predicted_memory_bytes)}` : `peak ${bytes(peak)}`),
      tile("Gradient norm", plain(end?.grad_norm), end ? `learning rate ${plain(end.learning_rate)}` : ""),
      tile("Tokens trained", end ? whole(end.num_tokens) : "–", ""),
      tile("Skipped steps", whole(state.skipped_steps ?? skipped), `of ${whole(end?.step ?? 0)}`, "", (state.skipped_steps ?? skipped) > 0),
    ];
    part("overview").querySelector(".tiles").replaceChildren(...made);
  }

  // Spectra.
  const METRICS = {
    effective_rank: { name: "effective rank", told: "of the update s·B·A: 1 where one direction does all, the rank where all do alike" },
    update_ratio: { name: "update / weight", told: "‖s·B·A‖ over ‖W‖, Frobenius norms" },
    balance: { name: "A / B", log: true, told: "‖A‖ over ‖B‖, log scale" },
  };

  function spectrum() {
    show("spectra", spectra.size > 0);
    if (!spectra.size) return;
    const all = [...spectra.keys()].sort((a, b) => a - b);
    const step = view.step != null && spectra.has(view.step) ? view.step : all.at(-1);
    const layers = Object.entries(spectra.get(step).layers).map(([path, figures]) => ({ path, values: figures.singular_values, ...figures }));
    heat(part("spectra"), { layers, metrics: METRICS, view, choices: stepChooser(all, step), redraw: spectrum, told: layer => (
      `after step ${whole(step)}: effective rank ${plain(layer.effective_rank)} of ${layer.values?.length ?? 0}, update / weight ${plain(layer.update_ratio)}, A / B ${plain(layer.balance)}`
    ) });
  }

  function stepChooser(all, step) {
    const label = make("label", "", `after step ${whole(step)}`);
    if (all.length > 1) {
      const slider = make("input");
      Object.assign(slider, { type: "range", min: 0, max: all.length - 1, value: all.indexOf(step) });
      slider.setAttribute("aria-label", "step");
      slider.oninput = () => {
        const at = Number(slider.value);
        view.step = at === all.length - 1 ? null : all[at];
        label.firstChild.textContent = `after step ${whole(all[at])}`;
      };
      slider.onchange = spectrum;
      label.append(slider);
    }
    return label;
  }

  // What happened.
  function events(found) {
    const list = [
      ...found.filter(row => row.skipped).map(row => ({ step: row.step, bad: true, text: `not applied: ${row.skipped}` })),
      ...spikes(found).map(row => ({ step: row.step, bad: true, text: `gradient norm ${plain(row.norm)}, ${digits(row.times, 1)} times the median of the ${BEFORE} steps before` })),
      ...[...evals.values()].map(line => ({ step: line.step, text: `evaluation loss ${plain(line.eval_loss)}${line.best ? ", the best so far" : ""}` })),
    ].sort((a, b) => b.step - a.step);
    show("events", list.length > 0);
    part("events").replaceChildren(...list.slice(0, 500).map(event => {
      const item = make("li", event.bad ? "bad" : "");
      item.append(make("b", "", `step ${whole(event.step)}`), event.text);
      return item;
    }));
  }

  function audit() {
    const box = part("audit");
    if (!box) return;
    show("audit", state.audit != null);
    if (state.audit == null) return;
    const found = state.audit;
    const lines = (found.defects ?? []).map(defect => ({ bad: true, head: defect.what, text: `${defect.names.slice(0, 5).join(", ")}${defect.names.length > 5 ? ` and ${defect.names.length - 5} more` : ""}; likely cause: ${defect.cause}` }));
    if (found.passed) lines.push({ head: "passed", text: `${found.moved} of ${found.trained_tensors} tensors move; the output changes by up to ${plain(found.output_change)}; ${whole(found.base_tensors)} tensors of the base compared` });
    lines.push(...(found.notes ?? []).map(text => ({ head: "note", text })));
    box.replaceChildren(...lines.map(line => {
      const item = make("li", line.bad ? "bad" : "");
      item.append(make("b", "", line.head), " ", line.text);
      return item;
    }));
  }

  function told() {
    const box = part("log");
    if (!box) return;
    const text = (state.messages ?? []).join("\n");
    show("log", text !== "");
    if (box.textContent === text) return;
    const low = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
    box.textContent = text;
    if (low) box.scrollTop = box.scrollHeight;
  }

  // Drawing: as often as it costs a tenth of the time.
  let due = null, drawn = 0, cost = 0, dirtySpectra = true;
  function render() {
    due = null;
    const started = performance.now(), found = rows();
    show("loss", found.length > 0);
    show("course", found.length > 0);
    head(found);
    tiles(found);
    for (const panel of PANELS) draw(panel, false);
    if (dirtySpectra) { spectrum(); dirtySpectra = false; }
    events(found);
    audit();
    told();
    drawn = performance.now();
    cost = drawn - started;
  }
  function renderSoon() {
    if (due != null) return;
    due = setTimeout(render, Math.max(0, Math.max(200, 10 * cost) - (performance.now() - drawn)));
  }

  function listen() {
    const source = new EventSource(given.live);
    source.onopen = () => { connection = "open"; renderSoon(); };
    source.onerror = () => { if (connection !== "ended") { connection = "lost"; renderSoon(); } };
    source.addEventListener("reset", () => { steps.clear(); evals.clear(); spectra.clear(); dirtySpectra = true; renderSoon(); });
    source.addEventListener("state", event => { state = JSON.parse(event.data); renderSoon(); });
    source.addEventListener("lines", event => {
      const lines = JSON.parse(event.data);
      take(lines);
      if (lines.spectra.length) dirtySpectra = true;
      renderSoon();
    });
    source.addEventListener("end", () => { connection = "ended"; source.close(); renderSoon(); });
  }

  take(given.lines);
  PANELS.forEach(place);
  render();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => PANELS.forEach(panel => draw(panel, true)));
  if (given.live) listen();
})();
