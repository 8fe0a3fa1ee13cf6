// The pictures that this browser keeps, in IndexedDB; in memory where there is none.

const LIMIT = 200;

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
    transaction.onerror = () => reject(transaction.error);
  });
}

export class PictureStore {
  #database = null;

  get limit() {
    return LIMIT;
  }

  /** @returns {Promise<Object[]>} what is kept; rejected where nothing can be */
  async open() {
    const request = indexedDB.open("llamagen", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id" });
    const database = await settled(request);
    database.onversionchange = () => database.close();
    const pictures = await settled(
      database.transaction("pictures").objectStore("pictures").getAll(),
    );
    this.#database = database;
    return pictures;
  }

  async #write(change) {
    if (this.#database === null) throw new Error("no database");
    const transaction = this.#database.transaction("pictures", "readwrite");
    change(transaction.objectStore("pictures"));
    await finished(transaction);
  }

  put(picture) {
    return this.#write((store) => store.put(picture));
  }

  delete(ids) {
    return this.#write((store) => ids.forEach((id) => store.delete(id)));
  }

  clear() {
    return this.#write((store) => store.clear());
  }
}
