import { Sheet } from "./sheet";
import type { State } from "./studio";
import { megabytes, sentence } from "./words";

interface Props {
  state: State;
  onPick: (files: FileList) => void;
  onFree: () => void;
  onClose: () => void;
}

/** What the model is and who made what it learnt from; other models and pictures from this device. */
export function About({ state, onPick, onFree, onClose }: Props) {
  const { bundle, kept, device } = state;
  const folders = "webkitdirectory" in HTMLInputElement.prototype;
  return (
    <Sheet label="About" onClose={onClose}>
      <h2>About</h2>
      <p>
        Pictures are drawn by this device alone. The page asks no server for anything once its files are here
        {kept ? ", and works offline." : "."}
      </p>
      <div class="actions">
        <Pick label="Open a bundle’s folder" folder={folders} onPick={onPick} />
        <Pick label="Draw a PNG again" onPick={onPick} accept="image/png" />
      </div>
      {bundle && (
        <>
          <h3>{bundle.manifest.name}</h3>
          <dl>
            <Fact name="Pictures" value={`${bundle.manifest.image.width} × ${bundle.manifest.image.height}`} />
            <Fact
              name="Size"
              value={megabytes(Object.values(bundle.manifest.files).reduce((sum, file) => sum + file.size, 0))}
            />
            <Fact name="Made for" value={bundle.manifest.target === "litert-gpu" ? "WebGPU" : "CPUs"} />
            <Fact name="SHA-256" value={bundle.hash} kind="hash" />
          </dl>
          {bundle.manifest.licences.length > 0 && (
            <>
              <h3>Licences</h3>
              <ul class="licences">
                {bundle.manifest.licences.map(({ what, spdx, attribution }) => (
                  <li key={what}>
                    {what.replaceAll("-", " ")}: {spdx}
                    {attribution && <small>{attribution}</small>}
                  </li>
                ))}
              </ul>
            </>
          )}
        </>
      )}
      {device && (
        <>
          <h3>This device</h3>
          <p>{sentence(device.webgpuMissing ?? `WebGPU: ${device.adapter || "available"}`)}</p>
          <p>{sentence(device.threadsMissing ?? `${device.threads} threads`)}</p>
        </>
      )}
      {kept && (
        <div class="actions">
          <button type="button" onClick={onFree}>
            Delete the model from this device
          </button>
        </div>
      )}
    </Sheet>
  );
}

function Fact({ name, value, kind }: { name: string; value: string; kind?: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd class={kind}>{value}</dd>
    </div>
  );
}

interface PickProps {
  label: string;
  folder?: boolean;
  accept?: string;
  onPick: (files: FileList) => void;
}

function Pick({ label, folder, accept, onPick }: PickProps) {
  return (
    <label class="button pick">
      {label}
      <input
        type="file"
        multiple={!accept}
        accept={accept}
        {...(folder ? { webkitdirectory: true } : {})}
        onChange={({ currentTarget }) => currentTarget.files?.length && onPick(currentTarget.files)}
      />
    </label>
  );
}
