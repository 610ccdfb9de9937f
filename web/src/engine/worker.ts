/** The engine's worker: loads one bundle with LiteRT.js and draws with it. It ends when the page ends it. */

import type { LoadProgress, LoadReport, NetworkName } from "./api";
import { Bundle } from "./bundle";
import { type Loaded, draw } from "./drawing";
import { BundleError, EngineError } from "./errors";
import { asEngineError, LiteRt } from "./litert";
import { EMPTY_PROMPT, SELF_CHECK } from "./manifest";
import { type FromWorker, pack, type ToWorker } from "./messages";
import type { LiteRtNetwork } from "./network";
import type { Latents } from "./samplers/sampler";
import { fitTogether, InTurns, Resident } from "./residency";
import { selfCheck } from "./selfcheck";
import { PromptTokenizer } from "./tokenizer/prompt_tokenizer";

const NETWORKS: NetworkName[] = ["text_encoder", "unet", "decoder"];

let litert: LiteRt | null = null;
let loaded: Loaded | null = null;
let cancelled = false;

const send = (message: FromWorker, transfer: Transferable[] = []) => self.postMessage(message, { transfer });

self.onmessage = async ({ data }: MessageEvent<ToWorker>) => {
  if (data.type === "cancel") {
    cancelled = true;
    return;
  }
  const { id } = data;
  try {
    if (data.type === "load") send({ type: "done", id, value: await load(data) });
    else if (data.type === "memory") send({ type: "done", id, value: litert?.heapBytes ?? 0 });
    else {
      await generate(data);
      send({ type: "done", id, value: null });
    }
  } catch (error) {
    if (await lost()) return; // the page knows already, and takes up the request itself
    const told = error instanceof BundleError ? error : asEngineError(error, litert?.takeFault());
    send({ type: "failed", id, error: pack(told) });
  }
};

/** If the GPU went away: what fails because of it may be told before it is. */
async function lost(): Promise<boolean> {
  if (!litert?.device) return false;
  const soon = new Promise<null>((resolve) => setTimeout(resolve, 300, null));
  return (await Promise.race([litert.device.lost, soon])) !== null;
}

async function load({ id, bundle: descriptor, wasm, backend, threads }: ToWorker & { type: "load" }): Promise<LoadReport> {
  const began = performance.now();
  const bundle = Bundle.of(descriptor);
  const { manifest } = bundle;
  const together = fitTogether(manifest, backend);
  if (backend === "webgpu" && !together) {
    throw new EngineError("unsupported", "the networks do not fit into memory together, to be checked");
  }
  const files = ["tokenizer", EMPTY_PROMPT, ...(backend === "webgpu" ? [SELF_CHECK] : []), ...NETWORKS];
  const needed = files.filter((name) => manifest.files[name]);
  const of = needed.reduce((sum, name) => sum + manifest.files[name].size, 0);
  const bytes: Record<string, number> = {};
  const progress = (stage: LoadProgress["stage"], what: string) => {
    const all = Object.values(bytes).reduce((sum, part) => sum + part, 0);
    send({ type: "progress", id, progress: { stage, what, bytes: all, of } });
  };
  const read = (name: string) => {
    const content = bundle.file(name, {
      onBytes: (count) => {
        bytes[name] = count;
        progress("read", name);
      },
    });
    content.catch(() => undefined); // told where it is awaited
    return content;
  };
  // the first network comes while LiteRT does, each other one while the one before it is compiled
  let next = read(NETWORKS[0]);
  litert = await LiteRt.load(wasm, backend, threads);
  litert.device?.lost.then(({ message }) => send({ type: "lost", reason: message || "the browser does not say why" }));
  const runtime = performance.now() - began;
  let waited = 0;
  const wait = async <Value>(value: Promise<Value>): Promise<Value> => {
    const started = performance.now();
    const result = await value;
    waited += performance.now() - started;
    return result;
  };
  const floats = async (name: string) =>
    needed.includes(name) ? (new Float32Array((await wait(read(name))).buffer) as Latents) : null;
  const tokenizer = new PromptTokenizer(await wait(read("tokenizer")), manifest.tokenizer);
  const emptyStates = await floats(EMPTY_PROMPT);
  const known = await floats(SELF_CHECK);
  const networks = {} as Record<NetworkName, LiteRtNetwork>;
  const [compile, fullyAccelerated] = [{}, {}] as [Record<NetworkName, number>, Record<NetworkName, boolean>];
  for (const [i, name] of NETWORKS.entries()) {
    const content = await wait(next);
    const later = NETWORKS[i + 1];
    if (later) next = read(later);
    [compile[name], fullyAccelerated[name]] = [0, false];
    if (!together) continue; // it was read to be verified, and kept if it can be
    progress("compile", name);
    const started = performance.now();
    const compiled = await litert.compile(content, manifest.networks[name]);
    compile[name] = performance.now() - started;
    networks[name] = compiled.network;
    fullyAccelerated[name] = compiled.fullyAccelerated;
    if (backend === "webgpu" && !compiled.fullyAccelerated) {
      throw new EngineError("unsupported", `the GPU does not take every operation of the ${name}`);
    }
  }
  const drawn = { manifest, hash: bundle.hash, tokenizer, emptyStates };
  const checking = performance.now();
  const notes = [litert.note, bundle.notKept].filter((note) => note !== null);
  if (known) {
    progress("self-check", "unet");
    notes.push(await trusted(litert, networks, drawn, known));
  }
  if (!together) notes.push("the networks are loaded in turns: they do not fit into memory together");
  const inTurns = async (name: NetworkName) => {
    const compiled = await (litert as LiteRt).compile(await bundle.file(name), manifest.networks[name]);
    return compiled.network;
  };
  loaded = { ...drawn, networks: together ? new Resident(networks) : new InTurns(inTurns) };
  const now = performance.now();
  const halves = backend === "webgpu" && NETWORKS.some((name) => litert?.precisionOf(manifest.networks[name]) === "fp16");
  return {
    backend,
    threads: backend === "wasm" ? litert.threads : 1,
    notes,
    fullyAccelerated,
    precision: halves ? "fp16" : "fp32",
    milliseconds: { runtime, read: waited, compile, selfCheck: now - checking, total: now - began },
  };
}

/** What the self-check found, in a sentence; throws EngineError "unsupported" where the GPU is not to be trusted. */
async function trusted(
  litert: LiteRt,
  networks: Record<NetworkName, LiteRtNetwork>,
  drawn: Omit<Loaded, "networks">,
  known: Float32Array,
): Promise<string> {
  const { decibels, fault } = await selfCheck(networks, drawn, known, (spec) => litert.precisionOf(spec));
  const wrong = fault ?? litert.takeFault();
  if (wrong) throw new EngineError("unsupported", `the GPU computes something else (${wrong})`);
  const worst = Math.min(...Object.values(decibels));
  return `the GPU was checked: it computes what the bundle says, to ${worst.toFixed(0)} dB`;
}

async function generate({ id, request }: ToWorker & { type: "generate" }): Promise<void> {
  if (!loaded) throw new EngineError("unsupported", "no bundle is loaded");
  cancelled = false;
  await draw(loaded, request, {
    onStep: (event) => send({ type: "step", id, event }, event.preview ? [event.preview.data.buffer] : []),
    onPicture: (picture, index) => send({ type: "picture", id, picture, index }, [picture.data.buffer]),
    onWarning: (sentence) => send({ type: "warning", id, sentence }),
    cancelled: async () => {
      await breathe();
      return cancelled;
    },
  });
}

const channel = new MessageChannel();
channel.port1.start();

/** Lets waiting messages in: LiteRT keeps the thread while it computes. */
function breathe(): Promise<void> {
  return new Promise((resolve) => {
    channel.port1.onmessage = () => resolve();
    channel.port2.postMessage(null);
  });
}
