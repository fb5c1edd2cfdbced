'use strict'
/**
 * E2B's other exports: the `E2B` client, which binds options to the classes, and what belongs to E2B's cloud. The
 * latter exist so that a program which imports them loads; using them fails with an error that says why.
 */
const { Sandbox } = require('./sandbox')
const { ClientFactory } = require('./config')
const { ALL_TRAFFIC, unavailable } = require('./options')
const { quote } = require('./git')

const VolumeFileType = Object.freeze({
  UNKNOWN: 'unknown',
  FILE: 'file',
  DIRECTORY: 'directory',
  SYMLINK: 'symlink',
})

const WHY = {
  Template: 'templates are not built here yet: create a sandbox, set it up and call createSnapshot()',
  Volume: 'volumes belong to its cloud: keep data in a snapshot, or pass it through sandbox.files',
  Secret: 'secrets belong to its cloud: pass them as envs',
  ApiClient: 'there is no server to talk to: use the methods of Sandbox',
}

/** Gives a class static methods that reject. */
function refuse(Class, name, methods) {
  for (const method of methods) {
    Object.defineProperty(Class, method, {
      configurable: true,
      writable: true,
      value: async () => {
        throw unavailable(`${name}.${method}`, WHY[name])
      },
    })
  }
}

class Volume extends ClientFactory {
  constructor() {
    super()
    throw unavailable('Volume', WHY.Volume)
  }
}
refuse(Volume, 'Volume', ['create', 'connect', 'list', 'getInfo', 'destroy'])

class Secret extends ClientFactory {
  constructor() {
    super()
    throw unavailable('Secret', WHY.Secret)
  }

  static list() {
    throw unavailable('Secret.list', WHY.Secret)
  }
}
refuse(Secret, 'Secret', ['create', 'getInfo', 'exists', 'update', 'destroy'])

/** Pages of `Secret.list`, which there are none of. */
class SecretPaginator {
  constructor() {
    throw unavailable('SecretPaginator', WHY.Secret)
  }
}

class TemplateBase extends ClientFactory {
  constructor() {
    super()
    throw unavailable('Template', WHY.Template)
  }
}
refuse(TemplateBase, 'Template', [
  'build',
  'buildInBackground',
  'getBuildStatus',
  'exists',
  'aliasExists',
  'assignTags',
  'removeTags',
  'getTags',
  'toJSON',
])
TemplateBase.toDockerfile = () => {
  throw unavailable('Template.toDockerfile', WHY.Template)
}

/** E2B's `Template` is called without `new`, which a class does not allow; its statics are those of the class. */
const Template = Object.setPrototypeOf(function Template() {
  throw unavailable('Template', WHY.Template)
}, TemplateBase)

class ApiClient {
  constructor() {
    throw unavailable('ApiClient', WHY.ApiClient)
  }
}

/** A command whose success means that a template is ready. */
class ReadyCmd {
  #cmd

  constructor(cmd) {
    this.#cmd = cmd
  }

  getCmd() {
    return this.#cmd
  }
}

const waitForPort = (port) => new ReadyCmd(`ss -tuln | grep :${port}`)
const waitForURL = (url, statusCode = 200) =>
  new ReadyCmd(`test "$(curl -s -o /dev/null -w '%{http_code}' ${quote(url)})" = ${statusCode}`)
const waitForProcess = (name) => new ReadyCmd(`pgrep ${quote(name)} > /dev/null`)
const waitForFile = (path) => new ReadyCmd(`test -f ${quote(path)}`)
const waitForTimeout = (ms) => new ReadyCmd(`sleep ${Math.max(1, Math.floor(ms / 1000))}`)

/** A line of a template's build log. */
class LogEntry {
  constructor(timestamp, level, message) {
    this.timestamp = timestamp
    this.level = level
    this.message = message
  }

  toString() {
    return `[${this.timestamp.toISOString()}] [${this.level}] ${this.message}`
  }
}

class LogEntryStart extends LogEntry {
  constructor(timestamp, message) {
    super(timestamp, 'debug', message)
  }
}

class LogEntryEnd extends LogEntry {
  constructor(timestamp, message) {
    super(timestamp, 'debug', message)
  }
}

/** E2B's build logger prints; a library that prints nothing by itself leaves that to its caller. */
const defaultBuildLogger = () => () => {}

/** A client with options that every call made through its classes takes, unless the call says otherwise. */
class E2B {
  #opts

  constructor(opts = {}) {
    const { signal: _signal, ...bound } = opts
    this.#opts = bound
    /** @type {typeof Sandbox} */
    this.Sandbox = class extends Sandbox {
      static boundOpts = bound
    }
    this.Volume = class extends Volume {
      static boundOpts = bound
    }
    this.Secret = class extends Secret {
      static boundOpts = bound
    }
    this.Template = Template
  }

  /** A client with these options over this one's. */
  withOptions(opts = {}) {
    return new E2B({ ...this.#opts, ...opts })
  }
}

module.exports = {
  ALL_TRAFFIC,
  ApiClient,
  E2B,
  LogEntry,
  LogEntryEnd,
  LogEntryStart,
  ReadyCmd,
  Secret,
  SecretPaginator,
  Template,
  TemplateBase,
  Volume,
  VolumeFileType,
  defaultBuildLogger,
  waitForFile,
  waitForPort,
  waitForProcess,
  waitForTimeout,
  waitForURL,
}
