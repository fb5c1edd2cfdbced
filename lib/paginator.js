'use strict'
/** Pages of a listing, E2B's shape: `hasNext`, `nextToken`, `nextItems()`. */
class Paginator {
  #fetch
  #hasNext = true
  #nextToken

  /** @param {(token: string | undefined, opts: object | undefined) => Promise<{ items: unknown[], nextToken?: string }>} fetch */
  constructor(fetch, nextToken) {
    this.#fetch = fetch
    this.#nextToken = nextToken
  }

  get hasNext() {
    return this.#hasNext
  }

  get nextToken() {
    return this.#nextToken
  }

  async nextItems(opts) {
    if (!this.#hasNext) throw new Error('No more items to fetch')
    const page = await this.#fetch(this.#nextToken, opts)
    this.#nextToken = page.nextToken ?? undefined
    this.#hasNext = this.#nextToken !== undefined
    return page.items
  }
}

class SandboxPaginator extends Paginator {}
class SnapshotPaginator extends Paginator {}

module.exports = { SandboxPaginator, SnapshotPaginator }
