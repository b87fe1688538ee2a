// What the panel asks ComfyUI's server. Problems are {code, problem, what_to_do}, thrown.

import { api } from "../../../scripts/api.js";

const STATUS_MS = 8000;
const CHECK_MS = 40000;

export class Problem extends Error {
  constructor(found) {
    super(found.problem ?? "");
    this.found = found;
  }
}

export function fetchStatus() {
  return ask("/xdit/status", { cache: "no-store" }, STATUS_MS);
}

export function runHealthCheck() {
  return ask("/xdit/health-check", { method: "POST" }, CHECK_MS);
}

async function ask(route, options, milliseconds) {
  let answer;
  let body;
  try {
    answer = await api.fetchApi(route, {
      ...options,
      // What another site's page cannot send.
      headers: { "X-XDiT-Panel": "1" },
      signal: AbortSignal.timeout(milliseconds),
    });
    body = await answer.json().catch(() => null);
  } catch {
    throw new Problem({ code: "no-comfyui" });
  }
  if (answer.ok && body) return body;
  if (body?.problem) throw new Problem(body);
  throw new Problem({ code: answer.status === 404 ? "no-routes" : "comfyui-error" });
}
