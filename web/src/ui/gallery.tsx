import type { Kept } from "./pictures";
import { addressOf } from "./share";

interface Props {
  pictures: Kept[];
  total: number;
  onView: (kept: Kept) => void;
  onMore: () => void;
}

/** What was drawn in this browser, the newest first. */
export function Gallery({ pictures, total, onView, onMore }: Props) {
  if (pictures.length === 0) return null;
  return (
    <section class="gallery" aria-labelledby="gallery">
      <h2 id="gallery">
        Gallery <small>{total}</small>
      </h2>
      <ul>
        {pictures.map((kept) => (
          <li key={kept.id}>
            <button type="button" onClick={() => onView(kept)}>
              <img
                src={addressOf(kept)}
                width={kept.width}
                height={kept.height}
                alt={`${kept.settings.prompt || "no prompt"}, seed ${kept.settings.seed}`}
              />
            </button>
          </li>
        ))}
      </ul>
      {total > pictures.length && (
        <button type="button" class="quiet" onClick={onMore}>
          Show more
        </button>
      )}
    </section>
  );
}
