"use strict";
(() => {
  const data = JSON.parse(document.getElementById("hover-data").textContent);
  const make = (name, parent, cls) => {
    const space = parent.tagName === "svg" ? parent.namespaceURI : document.body.namespaceURI;
    const element = parent.appendChild(document.createElementNS(space, name));
    element.setAttribute("class", cls);
    return element;
  };
  const said = make("p", document.body, "unseen");
  said.setAttribute("role", "status");
  const nearest = (places, x) => {
    let low = 0, high = places.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (places[middle] < x) low = middle; else high = middle;
    }
    return x - places[low] < places[high] - x ? low : high;
  };
  const at = (line, i) => {
    const parts = [];
    if (line.s[i] !== null) parts.push("step " + line.s[i].toLocaleString("en-US"));
    if (line.t[i] !== null) parts.push(line.t[i] + " tokens");
    return parts.join(" · ");
  };
  const attach = (key, { w, h, lines }) => {
    const svg = document.querySelector("#panel-" + key + " svg[role=img]");
    const tip = make("div", svg.parentNode, "tip");
    tip.setAttribute("aria-hidden", "true");
    const rule = make("line", svg, "rule");
    rule.setAttribute("y1", 0);
    rule.setAttribute("y2", h);
    const dots = lines.map(() => make("circle", svg, "dot"));
    const hide = () => {
      tip.style.display = rule.style.display = "none";
      dots.forEach((dot) => { dot.style.display = "none"; });
    };
    let line = 0, point = lines[0].x.length - 1;
    const show = () => {
      const x = lines[line].x[point], y = lines[line].y[point], head = at(lines[line], point);
      const rows = [head];
      lines.forEach((other, n) => {
        const i = n === line ? point : nearest(other.x, x);
        const isNear = Math.abs(other.x[i] - x) < 3;
        dots[n].style.display = isNear ? "block" : "none";
        if (!isNear) return;
        dots[n].setAttribute("cx", other.x[i]);
        dots[n].setAttribute("cy", other.y[i]);
        dots[n].setAttribute("r", n === line ? 4.5 : 3);
        const elsewhere = at(other, i) === head ? "" : " (" + at(other, i) + ")";
        const name = lines.length > 1 || / median$/.test(other.n) ? other.n + ": " : "";
        rows.push(name + other.v[i] + elsewhere);
      });
      rule.setAttribute("x1", x);
      rule.setAttribute("x2", x);
      tip.style.display = rule.style.display = "block";
      tip.textContent = rows.join("\n");
      tip.style.top = (100 * y) / h + "%";
      tip.style.left = x < w / 2 ? (100 * x) / w + "%" : "auto";
      tip.style.right = x < w / 2 ? "auto" : 100 - (100 * x) / w + "%";
    };
    const point_at = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) * w) / box.width;
      const y = ((event.clientY - box.top) * h) / box.height;
      let best = Infinity;
      lines.forEach((other, n) => {
        const i = nearest(other.x, x);
        const far = Math.hypot(other.x[i] - x, (other.y[i] - y) / 3);
        if (far < best) [best, line, point] = [far, n, i];
      });
      show();
    };
    const keys = {
      ArrowLeft: () => { point -= 1; },
      ArrowRight: () => { point += 1; },
      ArrowUp: () => { line -= 1; },
      ArrowDown: () => { line += 1; },
      Home: () => { point = 0; },
      End: () => { point = Infinity; },
    };
    svg.tabIndex = 0;
    svg.addEventListener("pointermove", point_at);
    svg.addEventListener("pointerdown", point_at);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    svg.addEventListener("blur", hide);
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(); });
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide();
      if (!(event.key in keys) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      const x = lines[line].x[point];
      const before = line;
      keys[event.key]();
      line = Math.min(Math.max(line, 0), lines.length - 1);
      if (line !== before) point = nearest(lines[line].x, x);
      point = Math.min(Math.max(point, 0), lines[line].x.length - 1);
      show();
      said.textContent = tip.textContent;
    });
    hide();
  };
  Object.entries(data).forEach(([key, figure]) => attach(key, figure));
})();
