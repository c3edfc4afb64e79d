// The dialog of settings; kept in the browser.

const KEPT = "lacuna.settings";
const DEFAULTS = { form: null, system: "", temperature: 0.8, top_p: 0.95, max_tokens: 256, seed: null, tint: false, together: false, theme: "auto", a: "", b: "" };

const $ = (id) => document.getElementById(id);

export class Settings {
  constructor(onChange) {
    this.onChange = onChange;
    this.values = { ...DEFAULTS };
    try {
      Object.assign(this.values, JSON.parse(localStorage.getItem(KEPT)) || {});
    } catch { /* damaged: the defaults do */ }
    for (const id of ["form", "system", "temperature", "top_p", "max_tokens", "seed", "tint", "together"]) {
      $(`s-${id}`).addEventListener("input", () => this.read());
    }
    $("settings-reset").addEventListener("click", () => {
      const { a, b, theme, form } = this.values;
      this.values = { ...DEFAULTS, a, b, theme, form };
      this.show();
      this.keep();
      this.onChange();
    });
  }

  keep() {
    localStorage.setItem(KEPT, JSON.stringify(this.values));
  }

  read() {
    const number = (id, low, high) => {
      const n = Number($(id).value);
      return $(id).value !== "" && isFinite(n) ? Math.min(high, Math.max(low, n)) : null;
    };
    const v = this.values;
    v.form = $("s-form").value;
    v.system = $("s-system").value;
    v.temperature = number("s-temperature", 0, 2);
    v.top_p = number("s-top_p", 0.05, 1);
    v.max_tokens = Math.round(number("s-max_tokens", 1, 1e6) ?? DEFAULTS.max_tokens);
    const seed = number("s-seed", 0, 2 ** 32 - 1);
    v.seed = seed === null ? null : Math.round(seed);
    v.tint = $("s-tint").checked;
    v.together = $("s-together").checked;
    this.outputs();
    this.keep();
    this.onChange();
  }

  show() {
    const v = this.values;
    $("s-form").value = v.form || "chat";
    $("s-system").value = v.system;
    $("s-temperature").value = v.temperature;
    $("s-top_p").value = v.top_p;
    $("s-max_tokens").value = v.max_tokens;
    $("s-seed").value = v.seed ?? "";
    $("s-tint").checked = v.tint;
    $("s-together").checked = v.together;
    this.outputs();
  }

  outputs() {
    $("o-temperature").textContent = Number(this.values.temperature).toFixed(2);
    $("o-top_p").textContent = Number(this.values.top_p).toFixed(2);
    $("system-field").hidden = this.values.form === "text";
  }
}
