"use strict";
(() => {
  const packed = document.getElementById("data");
  if (!packed) return;
  const { cap, loss, statuses, tokens } = JSON.parse(packed.textContent);
  const text = document.getElementById("text"), tip = document.getElementById("tip");
  const words = [...text.querySelectorAll(".w")];
  const most = Math.max(2, ...tokens.map(t => t[0])), least = Math.min(...tokens.map(t => t[0]));
  const heat = {
    e: t => (t[0] - least) / Math.max(1, most - least),
    l: t => t[3] / loss / 1.2,
    d: t => Math.abs(t[3] - t[5]) / 2,
  };
  const colour = by => {
    words.forEach((w, i) => w.style.setProperty("--h", (0.75 * Math.min(1, Math.max(0, heat[by](tokens[i])))).toFixed(2)));
    text.dataset.by = by;
  };
  document.querySelectorAll("input[name=by]").forEach(input => {
    input.addEventListener("change", () => colour(input.value));
    if (input.checked) colour(input.value);
  });

  const line = (name, value) => {
    const p = document.createElement("p");
    p.textContent = name + value;
    return p;
  };
  let here = -1, moved = 0;
  const hide = () => {
    if (here >= 0) words[here].classList.remove("here");
    here = -1;
    tip.hidden = true;
  };
  const show = i => {
    hide();
    here = i;
    const [evaluations, residual, status, nats, likeliest, other, others] = tokens[i];
    const head = document.createElement("b");
    head.textContent = words[i].textContent.trim() || "(space)";
    const next = words[i].nextElementSibling;
    tip.replaceChildren(
      head,
      line("evaluations: ", evaluations + (evaluations >= cap ? " (the cap)" : "")),
      line("residual: ", residual.toExponential(1) + ", " + statuses[status].toLowerCase().replace("_", " ")),
      line("log-probability of " + (next ? "“" + next.textContent.trim() + "”" : "what follows") + ": ", (-nats).toFixed(2)),
      line("likeliest: ", likeliest.map(([w, p]) => w + " " + p + "%").join(", ")));
    if (other !== undefined) tip.append(line("the other: ", others + " evaluations, log-probability " + (-other).toFixed(2)));
    words[i].classList.add("here");
    tip.hidden = false;
    const at = words[i].getBoundingClientRect(), box = tip.getBoundingClientRect();
    const below = at.bottom + 6 + box.height < innerHeight;
    tip.style.left = Math.max(8, Math.min(at.left, innerWidth - box.width - 8)) + "px";
    tip.style.top = (below ? at.bottom + 6 : Math.max(8, at.top - box.height - 6)) + "px";
  };
  const at = event => event.target.closest && event.target.closest(".w");
  text.addEventListener("pointerover", event => { const w = at(event); if (w) show(+w.dataset.i); });
  text.addEventListener("click", event => { const w = at(event); if (w) show(+w.dataset.i); });
  text.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  text.addEventListener("blur", hide);
  addEventListener("scroll", () => { if (performance.now() - moved > 200) hide(); }, { passive: true });
  addEventListener("pointerdown", event => { if (!text.contains(event.target)) hide(); });
  text.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    const i = here < 0 ? 0 : Math.min(words.length - 1, Math.max(0, here + step));
    moved = performance.now();
    words[i].scrollIntoView({ block: "nearest" });
    show(i);
  });
})();
