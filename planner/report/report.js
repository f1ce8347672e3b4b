"use strict";
(() => {
  const root = document.documentElement, tip = document.getElementById("tip");

  // --- the theme: as the system has it, or as chosen; remembered where a page may remember -----
  const themes = ["system", "light", "dark"], button = document.getElementById("theme");
  const remembered = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const wear = (theme) => {
    if (theme === "system") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
    try { localStorage.setItem("theme", theme); } catch { /* a page from a file may not */ }
  };
  const worn = () => root.dataset.theme || "system";
  wear(themes.includes(remembered()) ? remembered() : "system");
  button.addEventListener("click", () => wear(themes[(themes.indexOf(worn()) + 1) % 3]));

  // --- the word beside the pointer, or beside what the keyboard is on --------------------------
  const show = (text, x, y) => {
    if (!text) { hide(); return; }
    if (tip.textContent !== text) tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(x + 12, innerWidth - box.width - 8)) + "px";
    tip.style.top = (y + 20 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
  };
  const hide = () => { tip.hidden = true; };

  const seconds = (s) => {
    for (const [size, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "us"]])
      if (s >= size) return (s / size).toPrecision(3) + " " + unit;
    return (s * 1e9).toPrecision(2) + " ns";
  };
  const KINDS = { F: "forward", B: "input gradient", W: "weight gradient", BW: "backward",
    R: "gradient reduction", O: "optimizer", D: "offload", H: "host and jitter" };
  const parsed = new WeakMap();
  const ops = (svg) => {  // each operation: kind, micro-batch, chunk, from, to, in units
    if (!parsed.has(svg)) {
      let at = 0;
      parsed.set(svg, svg.dataset.ops.split(" ").filter(Boolean).map((text) => {
        const [kind, ...rest] = text.split(","), [batch, chunk, gap, length] = rest.map(Number);
        const from = at + gap;
        at = from + length;
        return { kind, batch, chunk, from, to: at };
      }));
    }
    return parsed.get(svg);
  };
  const told = (svg, op) => {
    const unit = Number(svg.dataset.unit), start = Number(svg.dataset.from);
    const what = op.batch < 0 ? KINDS[op.kind] : KINDS[op.kind] + " of micro-batch " + op.batch +
      (svg.dataset.chunks > 1 ? ", virtual stage " + op.chunk : "");
    return "rank " + svg.dataset.rank + ": " + what + ", " + seconds((op.to - op.from) * unit) +
      " from " + seconds(start + op.from * unit);
  };
  const at = (svg, clientX) => {
    const box = svg.getBoundingClientRect(), wide = svg.viewBox.baseVal.width;
    const x = (clientX - box.left) / box.width * wide;
    return ops(svg).find((op) => op.from <= x && x <= op.to);
  };

  document.addEventListener("pointermove", (event) => {
    const svg = event.target.closest && event.target.closest("svg.ops");
    if (svg) {
      const op = at(svg, event.clientX);
      show(op ? told(svg, op) : "rank " + svg.dataset.rank + ": idle", event.clientX, event.clientY);
      return;
    }
    const mark = event.target.closest && event.target.closest("[data-tip]");
    show(mark && mark.dataset.tip, event.clientX, event.clientY);
  });
  document.addEventListener("pointerleave", hide);
  addEventListener("scroll", hide, { passive: true });

  // --- a chart with the keyboard: arrows go from mark to mark, Escape leaves --------------------
  for (const chart of document.querySelectorAll(".chart")) {
    let place = -1, lit = null;
    const unlit = () => { if (lit) lit.classList.remove("lit"); lit = null; hide(); };
    chart.addEventListener("keydown", (event) => {
      if (event.target !== chart) return;
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") unlit();
      if (!step) return;
      const marks = [...chart.querySelectorAll("[data-tip], svg.ops")]
        .filter((mark) => mark.getClientRects().length);
      if (!marks.length) return;
      event.preventDefault();
      place = (place + step + marks.length) % marks.length;
      unlit();
      lit = marks[place];
      lit.classList.add("lit");
      const box = lit.getBoundingClientRect();
      const text = lit.dataset.tip || "rank " + lit.dataset.rank + ": " + ops(lit).length + " operations";
      show(text, box.left + box.width / 2, box.bottom - 12);
    });
    chart.addEventListener("blur", () => { place = -1; unlit(); });
  }

  // --- the rank whose memory is taken apart -----------------------------------------------------
  for (const choose of document.querySelectorAll("button.choose"))
    choose.addEventListener("click", () => {
      const figure = choose.closest("figure");
      for (const other of figure.querySelectorAll("button.choose"))
        other.setAttribute("aria-pressed", String(other === choose));
      for (const part of figure.querySelectorAll(".waterfall"))
        part.hidden = part.id !== choose.getAttribute("aria-controls");
    });

  // --- on paper, every table is open ------------------------------------------------------------
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("figure > details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
})();
