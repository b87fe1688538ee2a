// The open panel: asks every few seconds while it is seen, and redraws what has changed.

import { app } from "../../../scripts/app.js";
import { make, makeState } from "./elements.js";
import { Problem, fetchStatus, runHealthCheck } from "./requests.js";
import * as sections from "./sections.js";
import { stringsOf } from "./strings.js";

const PAUSE_MS = 3000;
const STYLE = new URL("./panel.css", import.meta.url).href;

let panels = 0;

function currentLocale() {
  return app.extensionManager?.setting?.get?.("Comfy.Locale") ?? navigator.language;
}

export class Panel {
  constructor(element) {
    panels += 1;
    this.id = `xdit-panel-${panels}`;
    this.words = null;
    this.shown = new Map();
    this.timer = null;
    this.asking = false;
    this.closed = false;
    this.status = null; // the last report
    this.problem = null; // what the last question met instead
    this.check = null; // {boot, result} or {boot, problem}
    this.checking = false;
    this.build(element);
    this.whenSeen = () => this.refresh();
    document.addEventListener("visibilitychange", this.whenSeen);
    // The frontend may put the element into the page only after this.
    this.timer = setTimeout(this.whenSeen);
  }

  isIn(element) {
    return !this.closed && this.root.parentElement === element;
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    document.removeEventListener("visibilitychange", this.whenSeen);
    this.root.remove();
  }

  // --- asking

  isSeen() {
    if (document.visibilityState !== "visible") return false;
    return this.root.checkVisibility?.() ?? this.root.offsetParent !== null;
  }

  async refresh() {
    if (this.closed || this.asking) return;
    clearTimeout(this.timer);
    if (this.isSeen()) await this.ask();
    if (!this.closed) this.timer = setTimeout(() => this.refresh(), PAUSE_MS);
  }

  async ask() {
    this.asking = true;
    try {
      this.status = await fetchStatus();
      this.problem = null;
    } catch (error) {
      this.problem = foundIn(error);
    } finally {
      this.asking = false;
    }
    // What was found out about a daemon says nothing about the next one.
    if (this.check !== null && this.check.boot !== this.boot()) this.check = null;
    if (!this.closed) this.draw();
  }

  /** The running daemon's boot id; null without one. */
  boot() {
    return this.problem === null ? (this.status?.daemon.boot_id ?? null) : null;
  }

  async runCheck() {
    if (this.checking) return;
    const boot = this.boot();
    this.checking = true;
    this.check = null;
    this.draw();
    try {
      this.check = { boot, result: await runHealthCheck() };
    } catch (error) {
      this.check = { boot, problem: foundIn(error) };
    }
    this.checking = false;
    if (!this.closed) this.draw();
  }

  // --- drawing

  build(element) {
    const titled = (name) => {
      const title = make("h3", { id: `${this.id}-${name}` });
      const body = make("div", { class: "xdit-body" });
      const section = make("section", { "aria-labelledby": title.id, "data-part": name });
      section.append(title, body);
      return { section, title, body };
    };
    this.parts = Object.fromEntries(
      ["devices", "ranks", "components", "check"].map((name) => [name, titled(name)]),
    );
    this.state = make("p", { class: "xdit-headline", role: "status", "aria-live": "polite" });
    this.trouble = make("div", { class: "xdit-trouble", role: "alert" });
    this.head = make("div");
    this.button = make("button", { type: "button", class: "xdit-button" });
    this.button.addEventListener("click", () => this.runCheck());
    this.intro = make("p", { class: "xdit-detail" });
    this.verdict = make("p", { class: "xdit-verdict", role: "status", "aria-live": "polite" });
    this.rows = make("div");
    this.parts.check.body.append(this.intro, this.button, this.verdict, this.rows);
    this.root = make(
      "div",
      { class: "xdit-panel", role: "region", id: this.id },
      make("link", { rel: "stylesheet", href: STYLE }),
      this.state,
      this.trouble,
      this.head,
      ...Object.values(this.parts).map((part) => part.section),
    );
    element.replaceChildren(this.root);
    this.draw();
  }

  /** Redraw a part if what it shows has changed: focus, selection and reading stay otherwise. */
  show(target, name, key, build) {
    const text = JSON.stringify(key);
    if (this.shown.get(name) === text) return;
    this.shown.set(name, text);
    target.replaceChildren(...build());
  }

  draw() {
    const words = stringsOf(currentLocale());
    if (words !== this.words) {
      this.words = words;
      this.shown.clear();
      this.label(words);
    }
    this.drawState(words);
    const report = this.problem === null ? this.status : null;
    for (const name of ["devices", "ranks", "components"]) {
      this.parts[name].section.hidden = report === null;
    }
    this.head.hidden = report === null;
    if (report !== null) this.drawReport(report, words);
    this.drawCheck(words);
  }

  label(words) {
    this.root.setAttribute("aria-label", words.panel);
    this.parts.devices.title.textContent = words.devices;
    this.parts.ranks.title.textContent = words.ranks;
    this.parts.components.title.textContent = words.components;
    this.parts.check.title.textContent = words.healthCheck;
    this.intro.textContent = words.checkIntro;
  }

  drawState(words) {
    const problems = this.problem ? [this.problem] : (this.status?.problems ?? []);
    let [word, kind] = [words.asking, "busy"];
    if (this.problem) [word, kind] = [words.noDaemon, "bad"];
    else if (this.status) {
      const health = this.status.health;
      word = words.health[health] ?? health;
      kind = { ready: "good", degraded: "bad" }[health] ?? "busy";
    }
    this.root.dataset.health = this.problem ? "none" : (this.status?.health ?? "asking");
    this.show(this.state, "state", [word, kind], () => [makeState(word, kind)]);
    this.trouble.hidden = problems.length === 0;
    this.show(this.trouble, "trouble", problems, () =>
      problems.flatMap((problem) => sections.problemParts(problem, words)),
    );
  }

  drawReport(report, words) {
    const { daemon, notes, devices, ranks, group, queue, components } = report;
    const drawn = {
      devices: [devices, sections.deviceParts],
      ranks: [[ranks, group, queue], sections.rankParts],
      components: [components.map(withoutClock), sections.componentParts],
    };
    this.show(this.head, "head", [daemon, notes], () => sections.headParts(report, words));
    for (const [name, [key, build]] of Object.entries(drawn)) {
      this.show(this.parts[name].body, name, key, () => build(report, words));
    }
  }

  drawCheck(words) {
    this.button.textContent = this.checking ? words.checking : words.runCheck;
    // Not `disabled`, which would take the keyboard's focus away.
    this.button.setAttribute("aria-disabled", String(this.checking));
    this.rows.setAttribute("aria-busy", String(this.checking));
    const { result, problem } = this.check ?? {};
    let verdict = this.checking ? words.checking : "";
    if (result) verdict = sections.checkSummary(result, words);
    else if (problem) verdict = words.problems[problem.code]?.problem ?? problem.problem;
    if (this.verdict.textContent !== verdict) this.verdict.textContent = verdict;
    this.show(this.rows, "check", this.check, () => {
      if (result) return sections.checkParts(result, words);
      return problem ? sections.problemParts(problem, words).slice(1) : [];
    });
  }
}

function foundIn(error) {
  if (error instanceof Problem) return error.found;
  console.error("xdit-sidecar panel:", error);
  return { code: "comfyui-error" };
}

function withoutClock({ idle_seconds: _, ...component }) {
  return component;
}
