// The pictures of one model: tiles, the heat map of layers and sites, the strip of neurons.

const short = (site) => site.replace(/^.*\./, "").replace(/_proj$/, "");

export const bytes = (n) => {
  if (n === null || !isFinite(n)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 999.5 && i < 4) { n /= 1000; i++; }
  return `${n < 10 && i ? n.toFixed(1) : Math.round(n)} ${units[i]}`;
};

export const percent = (x) => (x === null ? "–" : `${x > 0 && x < 0.0995 ? (x * 100).toFixed(1) : Math.round(x * 100)} %`);
export const rate = (x) => (x === null ? "–" : x >= 99.5 ? String(Math.round(x)) : x.toFixed(1));

const parse = (colour) => (colour.match(/[\d.]+/g) || [0, 0, 0]).slice(0, 3).map(Number);

/** A colour between two, for `x` in 0 to 1. */
function between(low, high, x) {
  return `rgb(${low.map((v, i) => Math.round(v + (high[i] - v) * x)).join(",")})`;
}

/** A canvas whose pixels are the screen's, cleared; width and height in CSS pixels. */
function surface(canvas, height) {
  const width = canvas.clientWidth;
  const scale = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const g = canvas.getContext("2d");
  g.scale(scale, scale);
  g.clearRect(0, 0, width, height);
  const style = getComputedStyle(canvas);
  return { g, width, height, ink: style.borderTopColor, full: parse(style.color), empty: parse(style.caretColor) };
}

/** What one model did, token by token, and its pictures. */
export class Probe {
  constructor(root, { onLayer, onPeek }) {
    this.root = root;
    this.find = (name) => root.querySelector(`.${name}`);
    this.onPeek = onPeek;
    this.clear();
    const heat = this.find("heat");
    heat.addEventListener("pointermove", (e) => this.point(e));
    heat.addEventListener("pointerleave", () => { this.cell = null; onPeek(null); this.draw(); });
    heat.addEventListener("click", () => this.cell && onLayer(this.cell.layer));
    heat.addEventListener("keydown", (e) => this.walk(e));
    heat.addEventListener("blur", () => { this.cell = null; onPeek(null); this.draw(); });
    this.find("layer").addEventListener("change", (e) => onLayer(Number(e.target.value)));
    new ResizeObserver(() => this.draw()).observe(heat);
  }

  clear() {
    this.steps = [];
    this.sites = [];
    this.sum = null;
    this.total = 0;
    this.pinned = null;
    this.cell = null;
    this.times = [];
    this.queue();
  }

  title(name, side) {
    this.find("name").textContent = name;
    this.root.dataset.side = side;
  }

  /** Takes the activity of a token. */
  add(activity) {
    this.times.push(performance.now());
    if (activity && Array.isArray(activity.kept)) {
      this.sites = activity.sites;
      if (!this.sum || this.sum.length !== activity.kept.length) this.sum = activity.kept.map((r) => r.map(() => 0));
      activity.kept.forEach((row, l) => row.forEach((x, s) => { this.sum[l][s] += x; }));
      this.total += activity.bytes;
      this.steps.push({ ...activity, at: this.times.length });
    }
    this.queue();
    return this.steps.length - 1;
  }

  /** Shows one token's picture; null: the mean of all. */
  pin(step) {
    this.pinned = step !== null && this.steps[step] ? step : null;
    this.queue();
  }

  get speed() {
    const n = this.times.length;
    return n > 1 ? ((n - 1) * 1000) / (this.times[n - 1] - this.times[0]) : null;
  }

  get perToken() {
    return this.steps.length ? this.total / this.steps.length : null;
  }

  get kept() {
    const rows = this.rows();
    if (!rows) return null;
    const all = rows.flat().filter((x) => x !== null);
    // Nothing can be skipped in a dense model.
    return all.length ? all.reduce((a, b) => a + b, 0) / all.length : 1;
  }

  rows() {
    if (this.pinned !== null) return this.steps[this.pinned].kept;
    return this.sum && this.sum.map((r) => r.map((x) => x / this.steps.length));
  }

  queue() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  draw() {
    const has = this.steps.length > 0;
    this.root.classList.toggle("has", has);
    this.find("speed").textContent = rate(this.speed);
    const one = this.pinned !== null ? this.steps[this.pinned] : null;
    this.find("bytes").textContent = bytes(one ? one.bytes : this.perToken);
    this.find("share").textContent = percent(this.kept);
    this.find("when").textContent = !has ? "" : one ? `token ${one.at}` : `mean of ${this.steps.length}`;
    if (!has) return;
    this.fillLayers(this.sum.length);
    this.find("heat-box").hidden = !this.sites.length;
    this.find("dense").hidden = this.sites.length > 0;
    if (this.sites.length) this.drawHeat(this.rows());
    this.drawStrip();
  }

  drawHeat(rows) {
    const canvas = this.find("heat");
    const left = 26, top = 18, layers = rows.length, sites = this.sites.length;
    const low = document.body.classList.contains("is-pair");
    const cell = Math.max(low ? 4 : 5, Math.min(low ? 14 : 22, Math.floor((low ? 112 : 260) / layers)));
    const { g, width, ink, full, empty } = surface(canvas, top + layers * cell);
    const wide = (width - left) / sites, gap = cell > 8 ? 2 : 1;
    this.grid = { left, top, cell, wide };
    g.font = "10px ui-monospace, monospace";
    g.fillStyle = ink;
    g.textAlign = "center";
    this.sites.forEach((s, i) => g.fillText(fit(g, short(s), wide), left + (i + 0.5) * wide, 11));
    g.textAlign = "right";
    g.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(12 / cell));
    rows.forEach((row, l) => {
      if (l % every === 0) g.fillText(String(l), left - 7, top + (l + 0.5) * cell);
      row.forEach((x, s) => {
        if (x === null || x === undefined) return;
        const share = Math.min(1, Math.max(0, x)), box = [left + s * wide + 1, top + l * cell, wide - 2, cell - gap];
        // Where there is room, a bar and its number; else a colour.
        const roomy = wide >= 90;
        g.fillStyle = between(empty, full, roomy ? 0 : share);
        g.beginPath();
        g.roundRect(...box, Math.min(3, cell / 4));
        g.fill();
        if (!roomy) return;
        g.fillStyle = between(empty, full, 1);
        g.beginPath();
        g.roundRect(box[0], box[1], Math.max(2, box[2] * share), box[3], Math.min(3, cell / 4));
        g.fill();
        g.fillStyle = share > 0.8 ? between(empty, full, 0) : ink;
        if (cell >= 12) g.fillText(percent(share), box[0] + box[2] - 6, box[1] + box[3] / 2 + 0.5);
      });
      g.fillStyle = ink;
    });
    const chosen = Number(this.find("layer").value);
    g.fillStyle = between(empty, full, 1);
    g.fillRect(left - 4, top + chosen * cell, 2, cell - gap);
    if (this.cell) {
      g.strokeStyle = ink;
      g.lineWidth = 1.5;
      g.strokeRect(left + this.cell.site * wide + 1, top + this.cell.layer * cell, wide - 2, cell - gap);
    }
  }

  drawStrip() {
    const withStrip = this.steps.filter((s) => s.strip && s.strip.cells.length);
    this.find("strip-box").hidden = !withStrip.length;
    if (!withStrip.length) return;
    const canvas = this.find("strip");
    const height = 3;
    const rows = document.body.classList.contains("is-pair") ? 22 : 48;
    const { g, width, full, empty } = surface(canvas, rows * height);
    const at = this.pinned ?? this.steps.length - 1;
    const first = Math.max(0, Math.min(at - rows / 2, this.steps.length - rows));
    const most = 255;
    this.steps.slice(first, first + rows).forEach((step, i) => {
      if (!step.strip) return;
      const cells = step.strip.cells, w = width / cells.length;
      cells.forEach((v, c) => {
        if (!v) return;
        g.fillStyle = between(empty, full, (v / most) ** 0.7);
        const from = Math.round(c * w);
        g.fillRect(from, i * height, Math.max(1, Math.round((c + 1) * w) - from), height - 1);
      });
      if (first + i === this.pinned) {
        g.strokeStyle = `rgb(${full.join(",")})`;
        g.strokeRect(0.5, i * height - 0.5, width - 1, height + 0.5);
      }
    });
  }

  /** Marks the layer that the next answer's strip will show. */
  setLayer(l) {
    this.find("layer").value = String(l);
    this.queue();
  }

  fillLayers(count) {
    const select = this.find("layer");
    if (select.options.length === count) return;
    select.replaceChildren(...Array.from({ length: count }, (_, l) => new Option(String(l), String(l))));
    const step = this.steps[this.steps.length - 1];
    select.value = String(step.strip ? step.strip.layer : 0);
  }

  point(e) {
    const { left, top, cell, wide } = this.grid || {};
    if (!wide) return;
    const site = Math.floor((e.offsetX - left) / wide), layer = Math.floor((e.offsetY - top) / cell);
    this.show(layer, site, e.clientX, e.clientY);
  }

  walk(e) {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
    if (e.key === "Enter" && this.cell) { e.target.click(); return; }
    if (!move || !this.grid) return;
    e.preventDefault();
    const from = this.cell || { layer: 0, site: 0 };
    const layer = Math.min(this.sum.length - 1, Math.max(0, from.layer + (this.cell ? move[0] : 0)));
    const site = Math.min(this.sites.length - 1, Math.max(0, from.site + (this.cell ? move[1] : 0)));
    const box = e.target.getBoundingClientRect();
    const { left, top, cell, wide } = this.grid;
    this.show(layer, site, box.left + left + (site + 0.5) * wide, box.top + top + (layer + 1) * cell);
  }

  show(layer, site, x, y) {
    const rows = this.rows();
    const share = rows && rows[layer] && rows[layer][site];
    this.cell = share === undefined || share === null || site < 0 ? null : { layer, site };
    this.onPeek(this.cell && { text: `layer ${layer}, ${this.sites[site]}: ${percent(share)} kept`, x, y });
    this.draw();
  }
}

function fit(g, text, width) {
  while (text.length > 1 && g.measureText(text).width > width - 2) text = text.slice(0, -1);
  return text;
}
