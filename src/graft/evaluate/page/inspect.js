"use strict";
// Draws the map of an inspected adapter's layers.
(() => {
  const { plain, heat } = graftPage;
  const { layers, directions, threshold } = JSON.parse(document.getElementById("inspection").textContent);
  const ALL = {
    update_ratio: { name: "update / weight", told: "‖update‖ over ‖W‖, Frobenius norms" },
    norm: { name: "update", told: "‖update‖, Frobenius norm" },
    effective_rank: { name: "effective rank", told: "exp of the entropy of the singular values: 1 where one direction does all" },
    stable_rank: { name: "stable rank", told: "‖update‖² over its largest singular value squared" },
    rank_95: { name: "95 %", told: "directions that hold 95 % of the energy of the update" },
    balance: { name: "A / B", log: true, told: "‖A‖ over ‖B‖, log scale" },
    intruders: { name: "new", told: `of the ${directions} leading directions of W + update those with |cosine| under ${threshold} to all of W` },
  };
  const metrics = Object.fromEntries(Object.entries(ALL).filter(([name]) => layers.some(layer => layer[name] != null)));
  const box = document.querySelector('[data-part="layers"]');
  if (!Object.keys(metrics).length) return;
  const view = { metric: Object.keys(metrics)[0], layer: null };
  const told = layer => Object.entries(metrics).map(([name, { name: title }]) => `${title} ${plain(layer[name])}`).join(", ")
    + (layer.note ? ` (${layer.note})` : "");
  const draw = () => heat(box, { layers, metrics, view, told, redraw: draw });
  draw();
})();
