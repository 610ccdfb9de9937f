import { useState } from "preact/hooks";
import { Icon } from "./icon";
import type { Kept } from "./pictures";
import { addressOf, canShare, share } from "./share";
import { Sheet } from "./sheet";
import { fileName } from "./words";

interface Props {
  kept: Kept;
  busy: boolean;
  onAgain: () => void;
  onDelete: () => void;
  onClose: () => void;
}

/** One picture of the gallery, what it was drawn with, and what can be done with it. */
export function Viewer({ kept, busy, onAgain, onDelete, onClose }: Props) {
  const [refused, setRefused] = useState(false);
  const { settings } = kept;
  const facts: [string, string | number][] = [
    ["Seed", settings.seed],
    ["Steps", settings.num_inference_steps],
    ["Guidance", settings.guidance_scale],
    ["Sampler", settings.sampler],
    ["Model", settings.bundle.split(" ")[0]],
  ];
  if (settings.negative_prompt) facts.push(["Not in it", settings.negative_prompt]);
  return (
    <Sheet label="Picture" onClose={onClose}>
      <img class="viewed" src={addressOf(kept)} width={kept.width} height={kept.height} alt={settings.prompt || "no prompt"} />
      <p class="said">{settings.prompt || "(no prompt)"}</p>
      <div class="actions">
        <button type="button" disabled={busy} onClick={onAgain}>
          <Icon name="again" /> Draw again
        </button>
        {canShare(kept) && (
          <button type="button" onClick={() => void share(kept).catch(() => setRefused(true))}>
            <Icon name="share" /> Share
          </button>
        )}
        <a class="button" href={addressOf(kept)} download={fileName(settings)}>
          <Icon name="save" /> Save
        </a>
        <button type="button" class="delete" onClick={onDelete}>
          <Icon name="bin" /> Delete
        </button>
      </div>
      {refused && <p role="alert">This device did not share the picture: save it and share the file.</p>}
      <dl>
        {facts.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
    </Sheet>
  );
}
