// What each part of the panel shows of one status report.

import { make, makeBar, makeState, makeTable } from "./elements.js";
import { humanAge, humanBytes, humanMilliseconds } from "./units.js";

const KINDS = {
  ready: "good", resident: "good", ok: "good",
  failed: "bad", degraded: "bad", orphaned: "bad", fail: "bad",
  skip: "idle",
};

function stateOf(state, words, text = words[state] ?? state) {
  return makeState(text, KINDS[state] ?? "busy");
}

export function problemParts(found, words) {
  const known = words.problems[found.code];
  const shown = known ?? found;
  const original = known && found.problem && known.problem !== found.problem;
  return [
    make("p", { class: "xdit-problem" }, shown.problem),
    original ? make("p", { class: "xdit-detail" }, found.problem) : null,
    make("p", {}, make("strong", {}, words.whatToDo), ": ", shown.what_to_do),
  ].filter((part) => part !== null);
}

export function headParts(report, words) {
  const { version, pid, uptime_seconds: seconds } = report.daemon;
  const about = words.daemon(version, pid, humanAge(seconds, words.time));
  return [
    make("p", { class: "xdit-detail" }, about),
    ...report.notes.map((note) => make("p", { class: "xdit-detail" }, note)),
  ];
}

export function deviceParts(report, words) {
  return report.devices.map((device) => {
    const total = Math.max(device.total, 1);
    const used = Math.max(0, device.total - device.free - device.regions);
    const sizes = [device.regions, device.free, device.total].map(humanBytes);
    return make(
      "div",
      { class: "xdit-device" },
      make(
        "p",
        {},
        make("strong", {}, device.name || device.device),
        " ",
        stateOf(device.state, words.states),
      ),
      makeBar([
        [device.regions / total, "xdit-shared"],
        [used / total, "xdit-used"],
      ]),
      make("p", { class: "xdit-detail" }, words.memory(...sizes)),
      device.error ? make("p", { class: "xdit-problem" }, device.error) : null,
    );
  });
}

export function rankParts(report, words) {
  const group = report.group;
  if (group === null) return [make("p", { class: "xdit-detail" }, words.noRanks)];
  const rows = report.ranks.map((rank) => [
    String(rank.rank),
    rank.device,
    String(rank.pid ?? "–"),
    [
      stateOf(rank.state, words.states),
      ...(rank.error ? [make("p", { class: "xdit-problem" }, rank.error)] : []),
    ],
  ]);
  return [
    make(
      "p",
      {},
      stateOf(group.state, words.states, words.group(words.states[group.state], group.backend)),
      " · ",
      words.queue(report.queue),
    ),
    makeTable(words.ranks, [words.rank, words.device, words.pid, words.state], rows),
  ];
}

export function componentParts(report, words) {
  if (report.components.length === 0) {
    return [make("p", { class: "xdit-detail" }, words.nothingShared)];
  }
  const rows = report.components.map((component) => [
    [
      component.name,
      make(
        "p",
        { class: "xdit-detail" },
        `${component.kind} · ${component.device} · `,
        componentState(component, words),
      ),
    ],
    humanBytes(component.size),
    sharerList(component.sharers, words),
  ]);
  const heads = [words.component, words.size, words.sharedBy];
  return [makeTable(words.components, heads, rows)];
}

function componentState(component, words) {
  const { state, filled, size } = component;
  if (state !== "filling" || !filled) return stateOf(state, words.states);
  const percent = Math.floor((filled * 100) / Math.max(size, 1));
  return stateOf(state, words.states, words.filling(percent));
}

function sharerList(sharers, words) {
  if (sharers.length === 0) return words.nobody;
  return make("ul", {}, ...sharers.map((sharer) => {
    const who = sharer.this_process ? words.thisComfyUI : sharer.program;
    return make(
      "li",
      {},
      who,
      make("span", { class: "xdit-detail" }, ` ${words.pid} ${sharer.pid}`),
    );
  }));
}

export function checkSummary(result, words) {
  const count = (status) => result.checks.filter((check) => check.status === status).length;
  const bad = count("fail");
  const all = result.checks.length;
  let summary = words.healthy(all);
  if (bad > 0) summary = words.unhealthy(bad, all);
  else if (!result.ok) summary = words.notProved;
  return count("warn") > 0 ? summary + words.warnings(count("warn")) : summary;
}

export function checkParts(result, words) {
  const rows = result.checks.map((check) => {
    const isQuiet = check.status === "ok" || check.status === "skip";
    const row = make(
      "details",
      { open: isQuiet ? null : "" },
      make(
        "summary",
        {},
        stateOf(check.status, words.checkStates),
        " ",
        make("strong", {}, check.name),
        make("span", { class: "xdit-detail" }, ` ${humanMilliseconds(check.ms)}`),
      ),
      make("p", { class: "xdit-detail" }, check.detail),
      check.fix ? make("p", {}, make("strong", {}, words.whatToDo), ": ", check.fix) : null,
    );
    return make("li", { "data-status": check.status }, row);
  });
  return [make("ul", { class: "xdit-checks" }, ...rows)];
}
