"use strict";
// What pages on the layers of an adapter share: numbers as a reader wants them, and a map of figures by block and linear.
const graftPage = (() => {
  const make = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text != null) made.textContent = text;
    return made;
  };

  const digits = (value, most) => value.toLocaleString("en", { maximumFractionDigits: most, minimumFractionDigits: most });
  const plain = value => {
    if (value == null) return "–";
    if (Number.isInteger(value)) return digits(value, 0);
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
    if (size >= 1000) return digits(value, 0);
    return digits(value, Math.max(0, Math.min(4, 3 - Math.floor(Math.log10(size)))));
  };
  const short = value => {
    if (value == null) return "–";
    if (value !== 0 && (value < 1e-3 || value >= 1e4)) return value.toExponential(0);
    if (Number.isInteger(value)) return digits(value, 0);
    return value >= 100 ? digits(value, 0) : value >= 1 ? digits(value, 1) : digits(value, 3).replace(/^0/, "");
  };

  function block(path) {
    const found = path.match(/(?:^|\.)[^.]+\.(\d+)\.(.+)$/);
    return found ? { column: Number(found[1]), row: found[2] } : { column: 0, row: path };
  }

  // Fills a box with the map of one figure at a time and, below it, the singular values of the layer that is chosen.
  //   layers: {path, values, ...figures}; metrics: {key: {name, told, log}}; view: {metric, layer}, kept by the caller;
  //   choices: what stands beside the choice of the figure; told: what is said of a layer; redraw: called after a choice.
  function heat(box, { layers, metrics, view, choices, told, redraw }) {
    const placed = layers.map(layer => ({ ...layer, ...block(layer.path) }));
    const names = [...new Set(placed.map(layer => layer.row))];
    const columns = [...new Set(placed.map(layer => layer.column))].sort((a, b) => a - b);
    const log = Boolean(metrics[view.metric].log);
    const scaled = value => (value == null || (log && !(value > 0)) ? null : log ? Math.log(value) : value);
    const values = placed.map(layer => scaled(layer[view.metric])).filter(value => value != null);
    const low = Math.min(...values), high = Math.max(...values);
    if (!placed.some(layer => layer.path === view.layer)) {
      const size = layer => layer.update_ratio ?? layer.norm ?? 0;
      view.layer = placed.reduce((top, layer) => (size(layer) > size(top) ? layer : top)).path;
    }
    const kept = box.querySelector(".scroll")?.scrollLeft ?? 0;
    const focus = document.activeElement?.dataset?.path;
    const map = make("div", "heat");
    map.style.gridTemplateColumns = `max-content repeat(${columns.length}, minmax(1.95rem, 1fr))`;
    map.append(make("div", "row", ""), ...columns.map(column => make("div", "column", String(column))));
    for (const name of names) {
      map.append(make("div", "row", name));
      for (const column of columns) {
        const layer = placed.find(one => one.row === name && one.column === column);
        const cell = make(layer ? "button" : "div");
        if (layer) {
          const value = scaled(layer[view.metric]);
          const share = value == null ? null : high > low ? (value - low) / (high - low) : 0.5;
          if (share != null) {
            const [from, to, part] = share < 0.5 ? ["--h0", "--h1", 2 * share] : ["--h1", "--h2", 2 * share - 1];
            cell.style.setProperty("--heat", `color-mix(in oklab, var(${to}) ${Math.round(100 * part)}%, var(${from}))`);
            cell.style.setProperty("--on-heat", share > 0.55 ? "var(--on-h2)" : "var(--on-h0)");
          }
          cell.type = "button";
          cell.dataset.path = layer.path;
          cell.textContent = short(layer[view.metric]);
          cell.title = `${layer.path}: ${plain(layer[view.metric])}`;
          cell.setAttribute("aria-pressed", String(layer.path === view.layer));
          cell.onclick = () => { view.layer = layer.path; redraw(); };
        }
        map.append(cell);
      }
    }
    const scroll = make("div", "scroll");
    scroll.append(map);
    const scale = make("div", "scale");
    const back = value => (log ? Math.exp(value) : value);
    if (values.length) scale.append(plain(back(low)), make("i"), plain(back(high)), make("span", "", metrics[view.metric].told));
    box.replaceChildren(chooser(metrics, view, redraw, choices), scroll, scale, detail(placed.find(layer => layer.path === view.layer), told));
    scroll.scrollLeft = kept;
    if (focus) box.querySelector(`[data-path="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
  }

  function chooser(metrics, view, redraw, choices) {
    const box = make("div", "choices"), segments = box.appendChild(make("div", "segments"));
    for (const [metric, { name }] of Object.entries(metrics)) {
      const button = segments.appendChild(make("button", "", name));
      button.type = "button";
      button.setAttribute("aria-pressed", String(metric === view.metric));
      button.onclick = () => { view.metric = metric; redraw(); };
    }
    if (choices) box.append(choices);
    return box;
  }

  function detail(layer, told) {
    const box = make("div", "layer"), values = layer.values ?? [];
    box.append(make("h3", "", layer.path), make("p", "", told(layer)));
    if (!values.length) return box;
    const bars = box.appendChild(make("div", "bars"));
    for (const [at, value] of values.entries()) {
      const bar = bars.appendChild(make("div"));
      bar.style.height = `${values[0] ? Math.max(1, (100 * value) / values[0]) : 1}%`;
      bar.title = `${at + 1}: ${plain(value)}`;
    }
    box.append(make("p", "", `singular values of the update, from ${plain(values[0])} to ${plain(values.at(-1))}`));
    return box;
  }

  return { make, digits, plain, heat };
})();
