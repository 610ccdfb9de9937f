/** What this device offers, found out before anything is loaded. */

import type { Device } from "./api";

const MOST_THREADS = 4; // a phone's fast cores

export async function probe(): Promise<Device> {
  const isolated = globalThis.crossOriginIsolated === true;
  const threads = isolated ? Math.max(1, Math.min(navigator.hardwareConcurrency || 1, MOST_THREADS)) : 1;
  const why = isolated ? "this device has one core" : "the page is not cross-origin isolated";
  const none = (webgpuMissing: string): Device => ({
    webgpuMissing,
    software: false,
    adapter: "",
    shaderF16: false,
    threads,
    threadsMissing: threads > 1 ? null : `one thread: ${why}`,
  });
  if (!globalThis.isSecureContext) return none("browsers give WebGPU to pages of https and of localhost only");
  if (!navigator.gpu) return none("this browser has no WebGPU");
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" }).catch(() => null);
  if (!adapter) return none("the browser finds no GPU that it may use");
  const { vendor, architecture, device } = adapter.info;
  const name = [vendor, architecture, device].filter(Boolean).join(" ");
  // where browsers tell it has moved
  const software = (adapter.info as { isFallbackAdapter?: boolean }).isFallbackAdapter ?? isFallback(adapter);
  return {
    ...none(""),
    webgpuMissing: software ? `this browser computes WebGPU in software (${name}), which WASM is faster than` : null,
    software,
    adapter: name,
    shaderF16: adapter.features.has("shader-f16"),
  };
}

function isFallback(adapter: GPUAdapter): boolean {
  return (adapter as { isFallbackAdapter?: boolean }).isFallbackAdapter ?? false;
}
