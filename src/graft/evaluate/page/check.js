"use strict";
// Browses the samples of a data check token by token, the places of its problems and the rows of an epoch.
(() => {
  const { splits } = JSON.parse(document.getElementById("check-data").textContent);
  const LEARNED = 1, CONTROL = 2, END = 4;
  const part = name => document.querySelector(`[data-part="${name}"]`);
  const make = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text != null) made.textContent = text;
    return made;
  };
  const count = number => number.toLocaleString("en");
  const slug = name => name.replaceAll(" ", "-");
  const short = where => where.slice(where.lastIndexOf("/") + 1);

  // What cannot be seen, or would turn the text around, is named.
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/u;
  const named = char => char < " " ? String.fromCharCode(0x2400 + char.charCodeAt(0))
    : `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  function put(box, text) {
    let run = "";
    for (const char of text) {
      if (!HIDDEN.test(char)) { run += char; continue; }
      if (run) box.append(run);
      run = "";
      box.append(make("span", "mark", char === "\n" ? "⏎" : char === "\t" ? "→" : named(char)));
      if (char === "\n" || char === "\t") box.append(char);
    }
    if (run) box.append(run);
  }

  // Everything that can be looked at in a split: choices of samples, kinds of places, rows.
  function views(split) {
    const found = split.choices.map(({ name, items }) =>
      ({ name, group: "samples", items: items.map(index => ({ samples: [index] })) }));
    found.push({ name: split.packing ? "packed rows" : "rows", group: "samples",
      items: split.rows.map((row, at) => ({ samples: row.map(([index]) => index), row: at })) });
    for (const { kind, name, places } of split.problems) {
      found.push({ name: kind, title: name, group: "problems",
        items: places.map(place => ({ samples: place.index == null ? [] : [place.index], place })) });
    }
    return found;
  }
  const all = splits.map(views);
  const view = { split: 0, name: all[0][0].name, at: 0 };
  const current = () => all[view.split].find(each => each.name === view.name) ?? all[view.split][0];

  function token(sample, at) {
    const flags = Number(sample.flags[at]);
    const span = make("span", "tok" + (flags & LEARNED ? " learned" : "") + (flags & CONTROL ? " control" : "") + (flags & END ? " end" : ""));
    const piece = sample.pieces[at];
    if (piece) put(span, piece); else span.append(make("span", "mark", "·"));
    const place = sample.gap >= 0 && at >= sample.gap ? at + sample.tokens - sample.ids.length : at;
    const told = [flags & LEARNED ? (flags & END ? "learned, an end" : "learned") : "context", ...(flags & CONTROL ? ["control token"] : [])];
    span.title = `token ${count(place + 1)}: id ${sample.ids[at]} ${JSON.stringify(piece)}; ${told.join(", ")}`;
    return span;
  }

  function tokens(box, sample) {
    for (let at = 0; at < sample.ids.length; at++) {
      if (at === sample.gap) box.append(make("span", "gap", `... ${count(sample.tokens - sample.ids.length)} tokens ...`));
      box.append(token(sample, at));
    }
  }

  function legend() {
    const box = make("p", "legend");
    for (const [name, text] of [["learned", "learned"], ["", "context"], ["control", "control token"], ["learned control end", "end, learned"]]) {
      box.append(make("span", `tok ${name}`, text));
    }
    box.append(make("span", "", "· part of a character"));
    return box;
  }

  function segments(names, chosen, choose) {
    const box = make("div", "segments");
    names.forEach((name, at) => {
      const button = make("button", "", name);
      button.type = "button";
      button.setAttribute("aria-pressed", String(at === chosen));
      button.addEventListener("click", () => choose(at));
      box.append(button);
    });
    return box;
  }

  function controls() {
    const box = make("div", "browse");
    const shown = current();
    if (splits.length > 1) {
      box.append(segments(splits.map(split => split.name), view.split, at => go(at, view.name, 0)));
    }
    const samples = all[view.split].filter(each => each.group === "samples");
    box.append(segments(samples.map(each => each.name), samples.indexOf(shown), at => go(view.split, samples[at].name, 0)));
    const problems = all[view.split].filter(each => each.group === "problems");
    if (problems.length) {
      const select = make("select");
      select.setAttribute("aria-label", "rows to look at");
      select.append(new Option("rows to look at ...", ""));
      for (const each of problems) select.append(new Option(each.title, each.name, false, each === shown));
      select.addEventListener("change", () => select.value && go(view.split, select.value, 0));
      box.append(select);
    }
    const steps = make("span", "steps");
    for (const [text, by, told] of [["‹", -1, "previous"], ["›", 1, "next"]]) {
      const button = make("button", "", text);
      button.type = "button";
      button.setAttribute("aria-label", told);
      button.addEventListener("click", () => move(by));
      steps.append(button);
    }
    steps.append(`${view.at + 1} of ${shown.items.length}`);
    box.append(steps);
    return box;
  }

  function about(item, split) {
    const told = make("p", "about");
    const held = item.samples.map(index => split.samples[index]);
    if (item.place) {
      told.append(make("b", "", short(item.place.where)), " ");
      put(told, item.place.told);
    } else if (item.row != null) {
      const used = split.rows[item.row].reduce((sum, [, length]) => sum + length, 0);
      told.append(make("b", "", `row ${item.row + 1}`), ` ${item.samples.length} sample${item.samples.length > 1 ? "s" : ""}, ${count(used)} of ${count(split.rowTokens)} tokens`);
    } else if (held[0]) told.append(make("b", "", short(held[0].where)));
    if (item.row == null && held[0]) {
      const { tokens: num, learned, note } = held[0];
      told.append(make("span", "", ` · ${count(num)} tokens, ${count(learned)} learned${note ? ` · ${note}` : ""}`));
    }
    return told;
  }

  function draw() {
    const split = splits[view.split];
    const item = current().items[view.at];
    const box = part("browser");
    box.replaceChildren(controls(), legend());
    if (!item) { box.append(make("p", "note", "Nothing here.")); return; }
    box.append(about(item, split));
    const held = item.samples.filter(index => split.samples[index]);
    if (held.length) {
      const pre = make("pre", "tokens");
      pre.tabIndex = 0;
      for (const index of held) {
        const sample = split.samples[index];
        if (item.row != null) pre.append(make("span", "border", `${short(sample.where)}, ${count(sample.tokens)} tokens`));
        tokens(pre, sample);
      }
      const picked = make("p", "picked-token", "");
      const pick = event => {
        const found = event.target.closest(".tok");
        if (!found) return;
        pre.querySelector(".picked")?.classList.remove("picked");
        found.classList.add("picked");
        picked.textContent = found.title;
      };
      pre.addEventListener("click", pick);
      pre.addEventListener("pointerover", pick);
      box.append(pre, picked);
    }
    const missing = item.samples.length - held.length;
    if (missing) box.append(make("p", "note", `${count(missing)} of its samples ${missing > 1 ? "are" : "is"} not in this page.`));
    if (item.place) {
      const raw = make("details", "raw");
      raw.open = !held.length;
      raw.append(make("summary", "", "the row as it stands in the file"));
      const pre = make("pre");
      put(pre, item.place.raw || "(not in this page)");
      raw.append(pre);
      box.append(raw);
    }
  }

  function go(split, name, at, scroll = false) {
    view.split = split;
    view.name = all[split].some(each => each.name === name) ? name : all[split][0].name;
    view.at = Math.max(0, Math.min(at, current().items.length - 1));
    const hash = `#look/${splits[split].name}/${slug(view.name)}/${view.at}`;
    if (location.hash !== hash) history.replaceState(null, "", hash);
    draw();
    if (scroll) part("browser").closest("section").scrollIntoView();
  }
  function move(by) {
    const { length } = current().items;
    if (length) go(view.split, view.name, (view.at + by + length) % length);
  }

  function follow() {
    const [, split, name, at] = decodeURIComponent(location.hash).match(/^#look\/([^/]+)\/([^/]+)\/(\d+)$/) ?? [];
    const number = splits.findIndex(each => each.name === split);
    const found = number < 0 ? null : all[number].find(each => slug(each.name) === name);
    if (found) go(number, found.name, Number(at), true);
  }

  function problems() {
    const box = part("problems");
    let any = false;
    splits.forEach(split => {
      for (const { kind, name, total, places } of split.problems) {
        any = true;
        const details = make("details");
        const summary = make("summary");
        summary.append(make("b", "", name), ` ${count(total)}${splits.length > 1 ? `, ${split.name} data` : ""}`);
        const list = make("ul", "places");
        places.forEach((place, at) => {
          const line = make("li");
          const link = make("a", "", short(place.where));
          link.href = `#look/${split.name}/${slug(kind)}/${at}`;
          const told = make("span");
          put(told, place.told);
          line.append(link, told);
          list.append(line);
        });
        if (total > places.length) list.append(make("li", "", `and ${count(total - places.length)} more`));
        details.append(summary, list);
        box.append(details);
      }
    });
    if (!any) box.append(make("p", "note", "None."));
  }

  function rows() {
    const box = part("rows");
    const split = splits[0];
    split.rows.forEach((row, at) => {
      const line = make("button", "rowline");
      line.type = "button";
      const used = row.reduce((sum, [, length]) => sum + length, 0);
      const fill = make("span", "fill");
      for (const [index, length] of row) {
        const piece = make("i");
        piece.style.width = `${100 * length / split.rowTokens}%`;
        piece.title = `${split.samples[index] ? short(split.samples[index].where) : `sample ${index + 1}`}: ${count(length)} tokens`;
        fill.append(piece);
      }
      line.append(make("span", "", `${at + 1}`), fill, make("span", "", `${(100 * used / split.rowTokens).toFixed(1)} %`));
      line.addEventListener("click", () => go(0, split.packing ? "packed rows" : "rows", at, true));
      box.append(line);
    });
  }

  addEventListener("hashchange", follow);
  addEventListener("keydown", event => {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowRight: 1, ArrowLeft: -1, j: 1, k: -1 }[event.key];
    if (by) { move(by); event.preventDefault(); }
  });
  problems();
  rows();
  draw();
  follow();
})();
