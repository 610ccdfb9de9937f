/** Pictures on their way out: addresses inside the page, files, other apps. */

import type { Kept } from "./pictures";
import { fileName } from "./words";

const addresses = new Map<number, string>();

/** An address of the picture's file, for as long as the page lives or until it is forgotten. */
export function addressOf(kept: Kept): string {
  let address = addresses.get(kept.id);
  if (!address) {
    address = URL.createObjectURL(new Blob([kept.png], { type: "image/png" }));
    addresses.set(kept.id, address);
  }
  return address;
}

export function forget(kept: Kept): void {
  const address = addresses.get(kept.id);
  if (address) URL.revokeObjectURL(address);
  addresses.delete(kept.id);
}

function fileOf(kept: Kept): File {
  return new File([kept.png], fileName(kept.settings), { type: "image/png" });
}

export function canShare(kept: Kept): boolean {
  return navigator.canShare?.({ files: [fileOf(kept)] }) ?? false;
}

/** Hands the picture to the device's own sheet of apps; what the person decides there is no error. */
export async function share(kept: Kept): Promise<void> {
  try {
    await navigator.share({ files: [fileOf(kept)] });
  } catch (error) {
    if ((error as Error).name !== "AbortError") throw error;
  }
}
