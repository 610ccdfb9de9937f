package androidx.activity

import android.content.res.AssetManager
import android.os.Bundle
import java.io.File

open class ComponentActivity {
    val assets: AssetManager get() = TODO()
    val filesDir: File get() = TODO()

    protected open fun onCreate(savedInstanceState: Bundle?) {}
}
