/** The gallery's store: drawn pictures as PNG files with their settings, in IndexedDB; in memory where that is refused. */

import type { Settings } from "../engine/api";

export interface Kept {
  id: number;
  png: Uint8Array<ArrayBuffer>;
  settings: Settings;
  width: number;
  height: number;
}

const NAME = "pocketfusion";
const STORE = "pictures";

export class Pictures {
  /** Why pictures are not kept; null while they are. */
  refused: string | null = null;
  private memory: Kept[] = [];
  private readonly database: Promise<IDBDatabase | null>;
  private readonly others = "BroadcastChannel" in globalThis ? new BroadcastChannel(`${NAME}-${STORE}`) : null;

  /** `onChange` is called when another tab has changed the gallery. */
  constructor(onChange: () => void) {
    this.database = openDatabase().catch(() => {
      this.refused = "This browser keeps no pictures for this page: save those that you want.";
      return null;
    });
    if (this.others) this.others.onmessage = onChange;
  }

  /** The newest pictures, at most `most`, the newest first. */
  async newest(most: number): Promise<Kept[]> {
    const database = await this.database;
    const stored = database ? await last(store(database, "readonly"), most) : [];
    return [...stored, ...this.memory].sort((a, b) => b.id - a.id).slice(0, most);
  }

  async count(): Promise<number> {
    const database = await this.database;
    return (database ? await asked(store(database, "readonly").count()) : 0) + this.memory.length;
  }

  /** Keeps a picture; one that the storage has no room for stays in memory, and `refused` says so. */
  async add(picture: Omit<Kept, "id">): Promise<Kept> {
    const kept = { ...picture, id: this.next() };
    const database = await this.database;
    try {
      if (!database) throw new Error("no database");
      const transaction = database.transaction(STORE, "readwrite");
      transaction.objectStore(STORE).add(kept);
      await finished(transaction);
      this.others?.postMessage("changed");
    } catch (error) {
      this.memory.push(kept);
      this.refused ??=
        (error as Error).name === "QuotaExceededError"
          ? "The storage is full: this picture is gone with the page. Save it, or delete others."
          : "The picture could not be kept: save it before you leave the page.";
    }
    return kept;
  }

  async delete(id: number): Promise<void> {
    this.memory = this.memory.filter((kept) => kept.id !== id);
    const database = await this.database;
    if (database) await asked(store(database, "readwrite").delete(id));
    this.others?.postMessage("changed");
  }

  private last = 0;

  /** Ids are times, so that two tabs' pictures are in order; no two of one tab are equal. */
  private next(): number {
    this.last = Math.max(this.last + 0.001, Date.now() + Math.random() / 1000);
    return this.last;
  }
}

async function openDatabase(): Promise<IDBDatabase> {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  return await asked(request);
}

function store(database: IDBDatabase, mode: IDBTransactionMode): IDBObjectStore {
  return database.transaction(STORE, mode).objectStore(STORE);
}

function last(from: IDBObjectStore, most: number): Promise<Kept[]> {
  return new Promise((resolve, reject) => {
    const found: Kept[] = [];
    const request = from.openCursor(null, "prev");
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor || found.length >= most) return resolve(found);
      found.push(cursor.value as Kept);
      cursor.continue();
    };
  });
}

function asked<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(transaction: IDBTransaction): Promise<void> {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
    transaction.onerror = () => reject(transaction.error);
  });
}
