// The words of the page: English where they are used, and their Chinese here. tests/test_locales.py finds what is missing.
import { app } from "../../../scripts/app.js";

const CHINESE = {
  GPUs: "显卡",
  "The processes of the xDiT group: state, memory, plans": "xDiT 进程组的各个进程：状态、显存、并行方案",
  "xDiT group": "xDiT 进程组",
  absent: "未启动",
  starting: "正在启动",
  loading: "正在加载",
  sampling: "正在采样",
  upscaling: "正在放大",
  decoding: "正在解码",
  encoding: "正在编码",
  recovering: "正在恢复",
  idle: "空闲",
  "loading {share}": "正在加载 {share}",
  "sampling {step} of {steps}": "正在采样 {step}/{steps}",
  "upscaling {step} of {steps}": "正在放大 {step}/{steps}",
  "recovering {step} of {steps}": "正在恢复 {step}/{steps}",
  "A job on an xDiT Backend starts a group.": "使用 xDiT 后端的任务会启动进程组。",
  "step {step} of {steps}": "第 {step}/{steps} 步",
  "{seconds} s/step": "{seconds} 秒/步",
  "tile {step} of {steps}": "第 {step}/{steps} 块",
  "{seconds} s/tile": "{seconds} 秒/块",
  "{time} left": "还剩 {time}",
  "warm for {minutes} min": "再保留 {minutes} 分钟",
  "in ComfyUI's own process": "在 ComfyUI 自己的进程中",
  "{plan} on {devices}": "{plan}，设备 {devices}",
  "as set in xDiT Backend": "按 xDiT 后端的设置",
  "log ↗": "日志 ↗",
  "link {rate} GB/s · {latency} µs": "连接 {rate} GB/s · {latency} µs",
  "last error: {error}": "最近的错误：{error}",
  "Free memory": "释放内存",
  "Stop group": "停止进程组",
  Restart: "重启",
  "Plans…": "并行方案…",
  "nothing is loaded": "没有加载任何模型",
  "memory is free; the next job loads again": "内存已释放；下一个任务会重新加载",
  "no group runs": "没有进程组在运行",
  "the group has ended; the next job starts it": "进程组已结束；下一个任务会启动它",
  "the group starts": "进程组正在启动",
  "{model}, {width}×{height}, {length} frames, on {devices}": "{model}，{width}×{height}，{length} 帧，设备 {devices}",
  "{model}, tiles of {width}×{height}, {length} frames, on {devices}": "{model}，每块 {width}×{height}，{length} 帧，设备 {devices}",
  "The times are of one of many tiles, which replicas share.": "时间是多块中一块的时间，各副本分担这些块。",
  "auto: {reason}": "auto 的选择：{reason}",
  "{time} a step": "每步 {time}",
  "{time} a tile": "每块 {time}",
  "{number} min": "{number} 分钟",
  "{number} s": "{number} 秒",
  "not exact": "近似",
  "does not fit": "放不下",
  "Fill xDiT Backend with this plan": "把这个方案填入 xDiT 后端",
  "{count} ranks, warm, {plan}": "{count} 个进程，待命，{plan}",
  "{count} ranks, {state}, {plan}": "{count} 个进程，{state}，{plan}",
  "other…": "其他…",
};

// Returns an English text in the language of ComfyUI, with values in the place of {names}.
export function say(english, values = {}) {
  const isChinese = app.extensionManager.setting.get("Comfy.Locale") === "zh";
  const text = (isChinese && CHINESE[english]) || english;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
