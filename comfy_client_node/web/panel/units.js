// Sizes and times as people read them; the same as the daemon's own commands print.

export function humanBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = bytes;
  let at = 0;
  while (Math.abs(size) >= 1024 && at < units.length - 1) {
    size /= 1024;
    at += 1;
  }
  const digits = Math.abs(size) >= 100 ? size.toFixed(0) : String(Number(size.toPrecision(3)));
  return `${digits} ${units[at]}`;
}

export function humanAge(seconds, words) {
  if (seconds < 120) return `${seconds.toFixed(0)} ${words.seconds}`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} ${words.minutes}`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} ${words.hours}`;
  return `${(seconds / 86400).toFixed(1)} ${words.days}`;
}

export function humanMilliseconds(ms) {
  return ms < 100 ? `${Number(ms.toPrecision(2))} ms` : `${ms.toFixed(0)} ms`;
}
