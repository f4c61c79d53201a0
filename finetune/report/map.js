// The map of clips: the nearest point under the pointer, the finger or the arrow keys shows its clip.
"use strict";
(() => {
  const map = document.querySelector(".map");
  const { points, labels, speakers } = JSON.parse(document.getElementById("map-data").textContent);
  const svg = map.querySelector(".plane svg"), tip = map.querySelector(".tip"), here = map.querySelector(".here");
  const [picture, id, about] = [tip.querySelector("img"), tip.querySelector("b"), tip.querySelector("span")];
  const marks = [...map.querySelectorAll(".p")];
  const off = { label: new Set(), speaker: new Set() };
  const REACH = 28; // pixels of the screen from the pointer to a point
  let current = -1;
  document.documentElement.classList.add("scripted");

  const visible = (p) => !off.label.has(p.l) && !off.speaker.has(p.s);
  const scale = () => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;

  function nearest(x, y, reach) {
    let best = -1, least = reach * reach;
    points.forEach((p, i) => {
      const distance = (p.x - x) ** 2 + (p.y - y) ** 2;
      if (distance < least && visible(p)) { best = i; least = distance; }
    });
    return best;
  }

  function show(i) {
    current = i;
    tip.hidden = i < 0;
    here.setAttribute("r", i < 0 ? 0 : 9);
    if (i < 0) return;
    const p = points[i];
    here.setAttribute("cx", p.x);
    here.setAttribute("cy", p.y);
    picture.hidden = !p.src;
    if (p.src) picture.src = p.src; else picture.removeAttribute("src");
    id.textContent = p.id;
    about.textContent = [labels[p.l], speakers[p.s]].filter(Boolean).join(" · ");
    const s = scale(), room = svg.getBoundingClientRect();
    const left = p.x * s + 14 + tip.offsetWidth > room.width ? p.x * s - 14 - tip.offsetWidth : p.x * s + 14;
    const top = Math.min(Math.max(p.y * s - tip.offsetHeight / 2, 0), Math.max(room.height - tip.offsetHeight, 0));
    tip.style.left = Math.max(left, 0) + "px";
    tip.style.top = top + "px";
  }

  function point(event) {
    const box = svg.getBoundingClientRect(), s = scale();
    show(nearest((event.clientX - box.left) / s, (event.clientY - box.top) / s, REACH / s));
  }

  // In the direction of the key, a step sideways counts double.
  const KEYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  function step([dx, dy]) {
    if (current < 0) return show(nearest(svg.viewBox.baseVal.width / 2, svg.viewBox.baseVal.height / 2, Infinity));
    const from = points[current];
    let best = -1, least = Infinity;
    points.forEach((p, i) => {
      const along = (p.x - from.x) * dx + (p.y - from.y) * dy;
      const aside = Math.abs((p.x - from.x) * dy) + Math.abs((p.y - from.y) * dx);
      const distance = along + 2 * aside;
      if (along > 0.05 && distance < least && visible(p)) { best = i; least = distance; }
    });
    if (best >= 0) show(best);
  }

  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(-1); });
  svg.addEventListener("focus", () => { if (current < 0 && svg.matches(":focus-visible")) step([1, 0]); });
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return show(-1);
    if (!KEYS[event.key]) return;
    event.preventDefault();
    step(KEYS[event.key]);
  });

  function filter() {
    points.forEach((p, i) => marks[i].classList.toggle("off", !visible(p)));
    if (current >= 0 && !visible(points[current])) show(-1);
    for (const button of map.querySelectorAll("button")) {
      button.textContent = off[button.dataset.kind].size ? "all" : "none";
    }
  }
  function set(box) {
    const { kind, i } = box.dataset;
    if (box.checked) off[kind].delete(+i); else off[kind].add(+i);
  }
  map.addEventListener("change", (event) => {
    if (!event.target.dataset.kind) return;
    set(event.target);
    filter();
  });
  for (const button of map.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const checked = off[button.dataset.kind].size > 0;
      for (const box of map.querySelectorAll(`input[data-kind="${button.dataset.kind}"]`)) {
        box.checked = checked;
        set(box);
      }
      filter();
    });
  }
  for (const box of map.querySelectorAll("input[data-kind]")) set(box); // a reloaded page may keep its ticks
  filter();
})();
