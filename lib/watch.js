'use strict'
/** A watched directory: calls back for each event in order, and once at the end. */

const FilesystemEventType = Object.freeze({
  CHMOD: 'chmod',
  CREATE: 'create',
  REMOVE: 'remove',
  RENAME: 'rename',
  WRITE: 'write',
})

/** Numbers of the types in E2B's wire protocol. */
const WIRE_TYPES = [undefined, 'create', 'write', 'remove', 'rename', 'chmod']

/** An event of the native layer, or one in the shape of E2B's wire protocol; `undefined` if it is something else. */
function normalize(event) {
  if (event?.event === undefined) return event
  const { case: what, value } = event.event
  const type = what === 'filesystem' ? WIRE_TYPES[value.type] : undefined
  return type && { name: value.name, type, entry: value.entry }
}

/** Handle of a watch. */
class WatchHandle {
  #stop
  #onEvent
  #onExit
  #stopped = false

  /**
   * Made by `files.watchDir`; the order of the arguments is E2B's.
   *
   * @param {() => void} stop ends the events
   * @param {AsyncIterable<object>} events
   */
  constructor(stop, events, onEvent, onExit) {
    this.#stop = stop
    this.#onEvent = onEvent
    this.#onExit = onExit
    this.#follow(events)
  }

  /** Stops watching; no event is told any more. */
  async stop() {
    this.#stopped = true
    this.#stop()
  }

  async #follow(events) {
    let failure
    try {
      for await (const item of events) {
        if (this.#stopped) break
        const event = normalize(item)
        if (event) await this.#onEvent?.(event)
      }
    } catch (error) {
      failure = { error }
    }
    try {
      // What fails after a stop fails because of it.
      if (failure && !this.#stopped) await this.#onExit?.(failure.error)
      else await this.#onExit?.()
    } catch {
      // There is nobody left to tell.
    } finally {
      this.#stop()
    }
  }
}

module.exports = { FilesystemEventType, WatchHandle }
