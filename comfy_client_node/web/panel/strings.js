// The panel's words. What the daemon itself says (errors, names, checks) stays as it says it.

const en = {
  panel: "xDiT sidecar status",
  asking: "Asking the daemon…",
  health: { ready: "Ready", starting: "Starting", degraded: "Needs attention" },
  noDaemon: "No answer",
  daemon: (version, pid, age) => `xdit-sidecar ${version} · pid ${pid} · up ${age}`,
  whatToDo: "What to do",
  devices: "Memory",
  memory: (regions, free, total) => `${regions} shared, ${free} free of ${total}`,
  ranks: "Ranks",
  rank: "Rank",
  device: "Device",
  state: "State",
  pid: "pid",
  noRanks: "No ranks: the daemon only shares memory.",
  group: (state, backend) => `${state}, ${backend}`,
  queue: (jobs) => (jobs === 0 ? "No jobs" : jobs === 1 ? "1 job" : `${jobs} jobs`),
  components: "Components",
  component: "Component",
  size: "Size",
  sharedBy: "Shared by",
  nobody: "nobody",
  nothingShared: "Nothing is resident yet. A workflow with an xDiT loader puts it there.",
  thisComfyUI: "this ComfyUI",
  filling: (percent) => `filling, ${percent} %`,
  states: {
    starting: "starting", ready: "ready", failed: "failed", degraded: "degraded",
    allocating: "allocating", filling: "filling", sealing: "sealing", resident: "resident",
    orphaned: "orphaned", freeing: "freeing",
  },
  healthCheck: "Health-check",
  runCheck: "Run health-check",
  checking: "Checking…",
  checkIntro: "Proves the whole path between this ComfyUI and the daemon.",
  healthy: (n) => `Healthy: ${n} checks`,
  unhealthy: (bad, n) => `${bad} of ${n} checks failed`,
  notProved: "No region could be proved",
  warnings: (n) => (n === 1 ? ", 1 warning" : `, ${n} warnings`),
  checkStates: { ok: "ok", warn: "warning", fail: "failed", skip: "skipped" },
  time: { seconds: "s", minutes: "min", hours: "h", days: "d" },
  // The server's own words are shown for codes that are not here.
  problems: {
    "no-comfyui": {
      problem: "ComfyUI’s server does not answer.",
      what_to_do: "See whether ComfyUI still runs. The panel asks again by itself.",
    },
    "no-routes": {
      problem: "The nodes of xdit-sidecar were not loaded.",
      what_to_do:
        "Install the pack’s requirements.txt into ComfyUI’s environment with pip, then start " +
        "ComfyUI again. Its log says what is missing.",
    },
    "comfyui-error": {
      problem: "ComfyUI’s server failed while it asked the daemon.",
      what_to_do: "See ComfyUI’s log for the error.",
    },
    absent: {
      problem: "No xdit-sidecar daemon answers.",
      what_to_do:
        "The daemon runs beside ComfyUI, in an environment of its own: install it there with " +
        "pip install '.[daemon]' in a clone of its repository, then start it with " +
        "xdit-sidecar serve.",
    },
  },
};

const zh = {
  panel: "xDiT sidecar 状态",
  asking: "正在询问守护进程…",
  health: { ready: "就绪", starting: "启动中", degraded: "需要处理" },
  noDaemon: "无应答",
  daemon: (version, pid, age) => `xdit-sidecar ${version} · 进程号 ${pid} · 已运行 ${age}`,
  whatToDo: "如何处理",
  devices: "显存与内存",
  memory: (regions, free, total) => `共享 ${regions}，空闲 ${free}，共 ${total}`,
  ranks: "计算进程（rank）",
  rank: "Rank",
  device: "设备",
  state: "状态",
  pid: "进程号",
  noRanks: "没有 rank：守护进程只共享内存。",
  group: (state, backend) => `${state}，${backend}`,
  queue: (jobs) => (jobs === 0 ? "没有任务" : `${jobs} 个任务`),
  components: "组件",
  component: "组件",
  size: "大小",
  sharedBy: "使用者",
  nobody: "无",
  nothingShared: "还没有常驻的组件。运行带有 xDiT 加载器的工作流后会出现在这里。",
  thisComfyUI: "本 ComfyUI",
  filling: (percent) => `填充中，${percent} %`,
  states: {
    starting: "启动中", ready: "就绪", failed: "失败", degraded: "已停用",
    allocating: "分配中", filling: "填充中", sealing: "封存中", resident: "常驻",
    orphaned: "已失去归属", freeing: "释放中",
  },
  healthCheck: "健康检查",
  runCheck: "运行健康检查",
  checking: "检查中…",
  checkIntro: "验证本 ComfyUI 与守护进程之间的整条通路。",
  healthy: (n) => `正常：共 ${n} 项检查`,
  unhealthy: (bad, n) => `${n} 项检查中有 ${bad} 项失败`,
  notProved: "没有任何内存区域通过验证",
  warnings: (n) => `，${n} 项警告`,
  checkStates: { ok: "正常", warn: "警告", fail: "失败", skip: "跳过" },
  time: { seconds: "秒", minutes: "分钟", hours: "小时", days: "天" },
  problems: {
    "no-comfyui": {
      problem: "ComfyUI 服务器没有应答。",
      what_to_do: "请确认 ComfyUI 仍在运行。面板会自动重试。",
    },
    "no-routes": {
      problem: "xdit-sidecar 的节点没有加载。",
      what_to_do:
        "请用 pip 把本节点包的 requirements.txt 安装到 ComfyUI 的环境中，然后重启 ComfyUI。" +
        "缺少什么见 ComfyUI 的日志。",
    },
    "comfyui-error": {
      problem: "ComfyUI 服务器在询问守护进程时出错。",
      what_to_do: "错误详情见 ComfyUI 的日志。",
    },
    absent: {
      problem: "没有 xdit-sidecar 守护进程应答。",
      what_to_do:
        "守护进程与 ComfyUI 并行运行，使用独立的环境：请用该环境的 pip 在" +
        "仓库的克隆目录中执行 pip install '.[daemon]'，然后用 xdit-sidecar serve 启动。",
    },
    lost: {
      problem: "守护进程刚刚停止或重启。",
      what_to_do:
        "请等待它恢复，或用 xdit-sidecar serve 启动它（原因见其日志），然后重新运行工作流。",
    },
    deadline: {
      problem: "守护进程没有及时应答。",
      what_to_do: "它可能很忙或已挂起：请查看其日志，若一直如此请重启它。",
    },
    "not-allowed": {
      problem: "守护进程属于另一个账户，不允许连接。",
      what_to_do: "请启动自己的守护进程，或请其所有者用 --trust-uid 启动。",
    },
    version: {
      problem: "守护进程使用另一个版本的协议。",
      what_to_do: "请为 ComfyUI 和守护进程安装相同版本的 xdit-sidecar，然后重启两者。",
    },
    "runtime-dir": {
      problem: "无法确定守护进程的运行目录。",
      what_to_do: "请把 XDIT_SIDECAR_RUNTIME_DIR 设为守护进程的目录，然后重启 ComfyUI。",
    },
    "device-failed": {
      problem: "有设备失败。",
      what_to_do: "请按守护进程日志中的说明排除原因，然后重启守护进程。",
    },
    "ranks-degraded": {
      problem: "rank 多次失败，已停用。",
      what_to_do: "在重启守护进程之前任务都会被拒绝：请按日志排除原因，然后重启它。",
    },
    "check-runs": {
      problem: "健康检查已在运行。",
      what_to_do: "请等它结束。",
    },
  },
};

/** The words of the frontend's locale, as "en" or "zh-TW". */
export function stringsOf(locale) {
  return String(locale).toLowerCase().startsWith("zh") ? zh : en;
}
